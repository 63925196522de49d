"""One file a paper; the reader of the paper recognises it.

Where it fits: the run loop asks a method what to collect, what to step on and for a micro-batch's loss.
``method``         the interface: Method, Needs, Experience, Update, Loss.
``online``         collecting images from the policy itself.
``advantages``     group advantages.   ``ppo`` the clipped surrogate.
``diffusion_nft``  DiffusionNFT.       ``flow_grpo`` Flow-GRPO.
``tempflow_grpo``  TempFlow-GRPO.      ``preference`` DPO, DSPO, DMPO and the SDPO safeguard.
``direct_align``   Direct-Align, SRPO, ReFL, DRaFT: the gradient of the reward itself.
``awm``            AWM.                ``supervised`` RWR and best-of-n, the baselines.
``forward_process`` what methods share that noise clean latents anew: DiffusionNFT, AWM and the baselines.
Gotchas: a loss is a sum over its rows and never calls backward; noise is seeded per sample and iteration, never by call
order; every model or reward call goes through the stack, which counts it.
"""
