"""The lessons' pictures, one a file: first its numbers, as pure functions, then the figure that shows them."""
