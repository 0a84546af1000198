"""Structure: which sub-networks a supernet has, and in which order its channels stand
(docs/methods.md, section 9)."""
