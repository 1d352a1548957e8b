"""The local control socket: QMP server, its commands, and the client that migratectl uses."""
