"""Models: definitions, the registry, and loading of checkpoints.

Shapes everywhere use one legend:

    T  tokens in the step (padded)        H  query heads
    B  rows in the step (padded)          K  KV heads
    M  pages a row has here (padded)      G  = H / K
    P  pages in the cache                 D  head size
    S  slots in a page (`page_size`)      E  model width
    R  rows that need logits              F  MLP width
    L  layers                             V  vocabulary
    Q, C  query and key tile sizes inside kernels

`[T, F@tensor]` says that F is split over the mesh axis `tensor`.
"""
