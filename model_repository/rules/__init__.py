"""What a model repository has to keep to, one theme per file and one rule per function; see `base`."""
