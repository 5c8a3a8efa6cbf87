"""Where questions come from: the toy Wikipedia, real files, the policies in the box."""
