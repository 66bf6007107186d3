"""What is measured against what: the sizes, the cells and the candidates. No library is imported.

Letters: B samples, T timesteps, D input features, H units.
"""

from dataclasses import asdict, dataclass

# Library names as they stand in the results; `benchmarks.workers` has one module for each.
LIBRARIES = ("lax.scan", "flax", "haiku", "keras", "torch", "jaxrnn")

GATES = {"lstm": 4, "gru": 3, "elman": 1}

GRID = (
    (32, 128, 64, 128),
    (1, 512, 128, 128),
    (64, 100, 256, 256),
    (16, 512, 128, 256),
    (128, 100, 512, 512),
)
QUICK_GRID = GRID[:1]

# Sequences, short and long, for which the gradient is also measured with blocks rematerialised.
REMAT_GRID = ((16, 512, 64, 128), (16, 8192, 64, 128))
QUICK_REMAT_GRID = REMAT_GRID[:1]

# Candidate (library, variant): which way of writing the cell that library is given.
NAIVE_STEPS = {
    "lstm": ("naive", "four_matmuls", "concatenating"),
    "gru": ("naive",),
    "elman": ("naive",),
}
PEERS = {
    "lstm": ("flax", "haiku", "keras", "torch"),
    "gru": ("flax", "haiku", "keras", "torch"),
    # Haiku's VanillaRNN has a ReLU where all others have tanh: a different function.
    "elman": ("flax", "keras", "torch"),
}

# One large matmul, the limit that a recurrent network can be held against.
GEMM = ("lax.scan", "gemm")
GEMM_SIZE = 2048


@dataclass(frozen=True)
class Case:
    """One cell at one size, with everything that computes it."""

    topic: str  # "speed", "remat" or "gpu"
    cell: str
    B: int
    T: int
    D: int
    H: int
    candidates: tuple[tuple[str, str], ...]

    @property
    def size(self) -> tuple[int, int, int, int]:
        """B, T, D and H."""
        return self.B, self.T, self.D, self.H

    def __str__(self) -> str:
        return f"{self.cell} {','.join(map(str, self.size))}"

    def as_dict(self) -> dict:
        """The case as JSON can hold it, without its candidates."""
        fields = asdict(self)
        del fields["candidates"]
        return fields

    def operations(self, kind: str) -> int:
        """Floating-point operations in the matmuls; the gradient's own are twice the forward's."""
        forward = 2 * self.T * self.B * GATES[self.cell] * self.H * (self.D + self.H)
        return forward if kind == "forward" else 3 * forward


def cases(quick: bool, sizes: list[tuple[int, ...]], libraries: list[str]) -> list[Case]:
    """The cases of one run.

    Args:
        quick: the small grid.
        sizes: (B, T, D, H) in place of the grid; remat cases are left out then.
        libraries: only candidates of these libraries.
    """
    grid = sizes or (QUICK_GRID if quick else GRID)
    remat_grid = () if sizes else (QUICK_REMAT_GRID if quick else REMAT_GRID)

    def chosen(candidates: list[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
        return tuple(candidate for candidate in candidates if candidate[0] in libraries)

    found = []
    for cell, variants in NAIVE_STEPS.items():
        # A machine's speed changes within a round: what is compared stands side by side.
        candidates = [GEMM]
        for variant in variants:
            candidates += [("lax.scan", variant), ("jaxrnn", variant)]
        layers = [(library, "layer") for library in PEERS[cell]]
        candidates += [*layers[:2], ("jaxrnn", "cell"), *layers[2:]]
        found += [Case("speed", cell, *size, chosen(candidates)) for size in grid]
    candidates = [("lax.scan", "naive"), ("jaxrnn", "naive"), ("jaxrnn", "naive_remat")]
    found += [Case("remat", "lstm", *size, chosen(candidates)) for size in remat_grid]
    return found
