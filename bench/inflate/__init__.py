"""The demo model widened to the shapes of well-known models, with the same function.

Speed and memory depend on the shape of a model; refusals and the length of answers depend on what
it does. A random model of the right shape refuses nothing and never ends an answer. Here the demo
model (`demo/model`) is embedded into a larger Llama, function-preserving as in Net2Net (Chen et
al. 2016, arXiv 1511.05641), but with zeros on the residual stream instead of copies.
"""
