"""PyTorch's own layers: oneDNN on the CPU, cuDNN on a GPU."""

import numpy as np
import torch

from benchmarks.problem import Problem, Weights
from benchmarks.worker import Call, Candidate, Library, serve

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

LAYERS = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "elman": torch.nn.RNN}


def _arrange(cell: str, weights: Weights) -> dict[str, np.ndarray]:
    kernel, recurrent_kernel, bias = weights.values()
    biases = bias if cell == "gru" else (bias, np.zeros_like(bias))

    def arranged(array):
        if cell == "gru":
            z, r, h = np.split(array, 3, axis=-1)
            array = np.concatenate([r, z, h], axis=-1)
        return array.T

    return {
        "weight_ih_l0": arranged(kernel),
        "weight_hh_l0": arranged(recurrent_kernel),
        "bias_ih_l0": arranged(biases[0]),
        "bias_hh_l0": arranged(biases[1]),
    }


def _synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def build(cell: str, variant: str, problem: Problem, dtype: str = "float32") -> Candidate:
    """The layer over batch-major inputs; its gradient by parameters and inputs."""
    features, units = problem.inputs.shape[-1], problem.reference.shape[-1]
    layer = LAYERS[cell](features, units, batch_first=True)
    with torch.no_grad():
        for name, value in _arrange(cell, problem.weights).items():
            getattr(layer, name).copy_(torch.from_numpy(value.copy()))
    layer = layer.to(DEVICE, getattr(torch, dtype))
    layer.flatten_parameters()  # cuDNN wants them side by side
    inputs, loss_weights = (
        torch.as_tensor(array).to(DEVICE, getattr(torch, dtype))
        for array in (problem.inputs, problem.loss_weights)
    )
    inputs.requires_grad_()
    parameters = [inputs, *layer.parameters()]

    def forward():
        with torch.no_grad():
            outputs, _ = layer(inputs)
        _synchronise()
        return outputs

    def gradient():
        outputs, _ = layer(inputs)
        # `grad` starts from nothing: no gradients of an earlier call to reset or add to.
        gradients = torch.autograd.grad((outputs * loss_weights).mean(), parameters)
        _synchronise()
        return gradients

    return Candidate(
        calls={"forward": Call(forward), "gradient": Call(gradient)},
        outputs=lambda outputs: outputs.cpu().numpy(),
        input_gradient=lambda gradients: gradients[0].cpu().numpy(),
    )


if __name__ == "__main__":
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    serve(Library(build, {"torch": str(torch.__version__)}, name))
