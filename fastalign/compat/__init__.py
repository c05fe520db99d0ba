"""Other code bases' names on our parts: `locality_alignment`, the package of the method's authors."""
