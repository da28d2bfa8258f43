"""A model's configuration: from a MaxText object or file, or from a hub config.json, and back to one."""
