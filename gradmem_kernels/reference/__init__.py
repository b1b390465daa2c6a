"""Plain PyTorch kernels: any floating dtype, any device. The oracle of the other backends; imports nothing of ours."""
