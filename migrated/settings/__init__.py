"""What can be set: the configuration file and the parameters of a migration."""
