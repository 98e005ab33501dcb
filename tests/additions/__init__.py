"""What somebody else would add: each file as CONTRIBUTING says, and nothing of the package is changed for it."""
