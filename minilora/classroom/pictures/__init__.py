"""The lessons' pictures, one a file: first the numbers, as pure functions, then the drawing of them."""
