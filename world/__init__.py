"""Where questions come from: the toy Wikipedia, real files, the pool, the worked example, the policies in the box."""
