"""What a claim rests on, and the page that shows all of them."""
