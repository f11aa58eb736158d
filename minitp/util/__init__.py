"""What has no better home: the machine and the launcher (environment), stdout, numbers and tables as text."""
