"""Benchmarks of jaxrnn against its peers; README.md says what is measured and how to run it."""
