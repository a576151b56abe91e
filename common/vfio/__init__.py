"""The VFIO uAPI in the kernel's names: device states, features, pre-copy info, dirty bitmaps."""
