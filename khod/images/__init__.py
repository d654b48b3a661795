"""Kernel and initrd images: taken into memory once, looked at there, loaded from there."""
