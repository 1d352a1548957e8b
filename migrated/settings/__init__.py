"""All settings: the configuration file and the parameters of a migration."""
