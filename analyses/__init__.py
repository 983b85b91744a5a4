"""Questions of papers, one function each: facts and a model in, a `Result` out."""
