"""Stock QEMU, driven from outside: device state from QEMU over QMP, memory by us, tracked by the kernel."""
