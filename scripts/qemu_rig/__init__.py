"""A rig for real QEMU guests: a small Linux guest that checks its own memory, stock QEMU to run it in, and figures of
what the guest noticed.

    kernel, cpio, image    a distribution's kernel and an initramfs whose only program is guest_init.c
    workload, disk         what the guest does; the disk it logs to and reads from
    launcher               one QEMU process, started as anyone would start it
    console                beats and answers of the guest, with the host's time of arrival; the gaps between them
    baseline, beside       QEMU's own migration of the same guest, to compare with; both ways, one after the other
    campaign               many moves of one guest there and back, each looked at
    campaign_figures       what campaigns measured, the file that it is kept in, and many runs together
    guest_agent            QEMU's guest agent for the initramfs
    slow_disk              a disk whose direct reads stay in flight for long
    figures                records and observations as one table, for terminals and reports, and one JSON document
    definition             the same guest as a definition for the daemons' driver

QEMU, the kernel and a C compiler come from the distribution. ``kernel.missing_packages`` says what lacks; nothing here
installs anything.
"""
