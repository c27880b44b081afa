"""SAEs that other tools saved: one file per format (`find.READERS`), from a folder or the hub; runs no pickle."""
