"""Data: digits (embedded), CIFAR-10, image folders; the four splits; augmentation and
normalisation.

Typical use: `registry.load_images` -> `splits.make_splits` -> `tensors.TensorData.from_images`.
"""
