"""The driver of ``vmm_sim``, the simulated VMM: one process for each guest, reached over its API socket.

driver    finds, starts and attaches guests, and reads their run logs
guest     one guest
calls     the connection, with errors in the words of the seam
"""
