"""The kernels inside other libraries' models; each module imports its library only when it is used."""
