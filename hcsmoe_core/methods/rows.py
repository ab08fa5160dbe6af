"""The methods: one row each."""

from hcsmoe_core.methods.recipes import Method
from hcsmoe_core.steps import METHODS

HC_SMOE = "HC-SMoE, ICML 2025, arXiv 2410.08589"
SOLVE = "one solve of I×I per group, on the sample"
CKA = "E² products of D×D per layer, on the sample"
M_SMOE = dict(
    similarity="router-logits", metric="cosine", group="single-shot", align="weights", budget="frequency"
)

METHODS.update(
    {
        "hc-smoe": Method(HC_SMOE, title="hierarchical clustering of mean outputs, weighted average"),
        "k-means": Method(HC_SMOE, title="k-means of mean outputs (the paper's ablation)", group="k-means"),
        "fuzzy": Method(
            HC_SMOE, title="fuzzy c-means of mean outputs, every expert mixed by membership", group="fuzzy"
        ),
        "random": Method(HC_SMOE, title="random groups (the paper's control)", group="random"),
        "fix-dom": Method(
            HC_SMOE,
            title="HC-SMoE's groups, neurons sent to the dominant expert's",
            combine="fix-dom",
            cost="I² per pair, on the sample",
        ),
        "zipit": Method(
            HC_SMOE,
            title="HC-SMoE's groups, the most correlated neurons joined",
            combine="zipit",
            cost="(n·I)² per group, on the sample",
        ),
        "m-smoe": Method(
            "M-SMoE, ICLR 2024, arXiv 2310.01334",
            title="groups around dominant experts by router logits, aligned average",
            cost="one assignment of I×I per expert",
            **M_SMOE,
        ),
        "mc-smoe": Method(
            "MC-SMoE, ICLR 2024, arXiv 2310.01334 (without its training)",
            title="M-SMoE, then each matrix as low rank plus rows",
            compress="low-rank",
            cost="one SVD per matrix, on the sample",
            **M_SMOE,
        ),
        "uncurl": Method(
            "UNCURL, 2024, arXiv 2409.01483 (hierarchical for its spectral clustering, without its training)",
            title="clusters by router logits, aligned average",
            similarity="router-logits",
            metric="cosine",
            align="weights",
            cost="one assignment of I×I per expert",
        ),
        "simsmoe": Method(
            "SimSMoE, NAACL Findings 2025, arXiv 2406.15883 (its measure of collapse, without its training)",
            title="experts that collapsed into one another by CKA of outputs joined, weighted average",
            similarity="cka",
            cost=CKA,
        ),
        "dek": Method(
            "DEK, ACL Findings 2025, arXiv 2407.09590",
            title="hierarchical clustering by CKA of outputs, experts and router rows averaged",
            similarity="cka",
            merge="average",
            router="averaged",
            cost=CKA,
        ),
        "sub-moe": Method(
            "Sub-MoE, AAAI 2026, arXiv 2506.23266",
            title="k-means by mean cosine of outputs, joint SVD",
            similarity="pairwise-cosine",
            group="k-means",
            combine="joint-svd",
            cost="one SVD per group and matrix",
        ),
        "grape": Method(
            "GRAPE, 2026, arXiv 2604.06542",
            title="non-uniform budgets by redundancy with an entropy guard, most similar pairs joined",
            similarity="cka",
            linkage="single",
            budget="grape",
            cost=CKA,
        ),
        "mergemoe": Method(
            "MergeMoE, 2025, arXiv 2510.14436",
            title="clusters by weights, down projection by least squares",
            similarity="weight",
            metric="cosine",
            combine="least-squares",
            cost=SOLVE,
        ),
        "hc-least-squares": Method(
            "this project",
            title="HC-SMoE's groups, down projection by least squares",
            combine="least-squares",
            cost=SOLVE,
        ),
        "functional": Method(
            "this project",
            title="hierarchical clustering by outputs token by token, least squares",
            similarity="functional-routed",
            combine="least-squares",
            cost=SOLVE,
        ),
        "selection": Method(
            "this project",
            title="HC-SMoE's groups, the best I of their neurons chosen",
            combine="selection",
            cost="greedy choice among n·I neurons per group, on the sample",
        ),
        "trimming": Method(
            "this project",
            title="no groups: every expert keeps the best share of its own neurons",
            group="none",
            cost="greedy choice among I neurons per expert, on the sample",
        ),
        "least-residual": Method(
            "this project",
            title="for each layer and group what leaves the smallest residual on held-out tokens",
            group="residual",
            cost="some solves of I×I and a greedy choice among (n+1)·I neurons per group tried, "
            "on the sample",
        ),
        "f-prune": Method(
            HC_SMOE + " (baseline)",
            title="the experts used least are dropped, over all layers",
            group="prune",
            saliency="frequency",
            budget="frequency",
        ),
        "s-prune": Method(
            HC_SMOE + " (baseline)",
            title="the experts with the lowest router scores are dropped, over all layers",
            group="prune",
            saliency="score",
            budget="saliency",
        ),
        "o-prune": Method(
            "NAEE, ACL 2024, arXiv 2402.14800",
            title="the experts are dropped whose loss changes the layer's output least",
            group="prune",
            saliency="o-prune",
            cost="every subset up to 16 experts, else 100,000 and a search, on the sample",
        ),
        "reap": Method(
            "REAP, ICLR 2026, arXiv 2510.13999",
            title="experts with the lowest mean gated output are dropped",
            group="prune",
            saliency="reap",
        ),
        "ean": Method(
            "in REAP, arXiv 2510.13999",
            title="experts with the lowest sum of output norms are dropped",
            group="prune",
            saliency="ean",
        ),
        "man": Method(
            "MAN, 2026, arXiv 2606.15716",
            title="experts with the lowest mean output norm are dropped",
            group="prune",
            saliency="man",
        ),
        "random-prune": Method(
            "-", title="random experts are dropped (a control)", group="prune", saliency="random"
        ),
    }
)
