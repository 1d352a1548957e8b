"""Interfaces of the Linux kernel that the standard library does not offer, each as a few plain functions.

    pagemap           PAGEMAP_SCAN: which pages of a process were written, are present, or huge
    userfault         userfaultfd: asynchronous write protection of memory
    memory            madvise, fallocate, mmap at a fixed address, mlock on fault
    privileges        user and capabilities of this process, given up for good
    process_memory    process_vm_readv and process_vm_writev: memory of another process
    injection         ptrace: a system call made inside another process
    tracking          a userfaultfd made inside another process and taken: its writes, tracked from outside

Nothing here knows of guests or migrations: addresses and sizes are bytes, and errors are ``OSError``, or those
of ``errors``, with a sentence.
The package imports nothing of the rest of this program, so the daemons and the simulated VMM can both use it.
"""
