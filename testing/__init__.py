"""What tests and benchmarks share: tiny models, fake tensors at full size, the host in process."""
