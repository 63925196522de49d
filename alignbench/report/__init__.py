"""From records to a page: `python -m alignbench.report results/`.

A pure function of the run directories: no model, no network, no clock, so the same records give the same bytes.

    data        run directories -> typed runs; whatever is odd about them is written down, not dropped
    statistics  intervals over runs, area under a curve, time to a target
    curves      step-efficiency figures (matplotlib -> SVG and PNG)
    interactive the same figures as plotly.js draws them in the page
    answer      the first screen: which method, and what it breaks
    tables      headline, efficiency, GenEval by tag, cost (-> HTML, CSV, Markdown)
    provenance  runs, protocols, settings, environments, and what differs that should not
    gallery     sample grids, embedded
    output      the folder that is written: what is the report's own, and what is not
    page        everything together, one self-contained HTML file

The unit of replication is a training run. Prompts, images and tags are measurements inside a run and never widen or
narrow an interval over runs.
"""
