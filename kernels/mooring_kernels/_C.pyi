"""CPU kernels on raw addresses (csrc/bindings/). Callers check dtype, layout and shape first.

``*_dtype`` is 0 for float32 and 1 for bfloat16; every other matrix is float32, labels are int64, all
contiguous. Sizes and ranges that are wrong raise ValueError.
"""

def cpu_capability() -> str: ...
def cpu_capabilities() -> list[str]: ...
def set_cpu_capability(name: str) -> None: ...
def row_normalise_forward(
    x: int, dtype: int, eps: float, unit: int, norm: int, N: int, D: int, threads: int, /
) -> None: ...
def row_normalise_backward(
    grad_unit: int,
    grad_norm: int,
    unit: int,
    norm: int,
    dtype: int,
    eps: float,
    grad_x: int,
    N: int,
    D: int,
    threads: int,
    /,
) -> None: ...
def batchnorm_statistics_planes(
    x: int,
    dtype: int,
    layer: tuple[int, int, int, int, float],
    y: int,
    mean: int,
    var: int,
    B: int,
    C: int,
    P: int,
    threads: int,
    /,
) -> None: ...
def batchnorm_statistics_rows(
    x: int,
    dtype: int,
    layer: tuple[int, int, int, int, float],
    y: int,
    mean: int,
    var: int,
    R: int,
    C: int,
    threads: int,
    /,
) -> None: ...
def ring_push(
    fields: list[tuple[int, int, int, int, int]],
    bank_labels: int,
    labels: int,
    K: int,
    B: int,
    head: int,
    normalise: bool,
    threads: int,
    /,
) -> None: ...
def class_ring_push(
    fields: list[tuple[int, int, int, int, int, int]],
    integers: tuple[int, int, int, int],
    shape: tuple[int, int, int],
    normalise: bool,
    threads: int,
    /,
) -> None: ...
def class_statistics(
    frozen: int,
    frozen_dtype: int,
    tuned: int,
    tuned_dtype: int,
    labels: int,
    head_weight: int,
    cga_scale: float,
    frozen_mean: int,
    tuned_mean: int,
    count: int,
    K: int,
    D: int,
    C: int,
    threads: int,
    /,
) -> None: ...
def calibrate_residual(
    frozen: int, dtype: int, labels: int, frozen_mean: int, out: int, K: int, D: int, C: int, threads: int, /
) -> None: ...
def calibrate_place(
    rows: int, labels: int, tuned_mean: int, scale: float, K: int, D: int, C: int, threads: int, /
) -> None: ...
def calibrate_translate(
    frozen: int,
    dtype: int,
    labels: int,
    frozen_mean: int,
    tuned_mean: int,
    scale: float,
    out: int,
    K: int,
    D: int,
    C: int,
    threads: int,
    /,
) -> None: ...
def softmax_cross_entropy_in_place(
    logits: int,
    stride: int,
    labels: int,
    smoothing: float,
    gradient: bool,
    loss: int,
    N: int,
    C: int,
    threads: int,
    /,
) -> None: ...
def text_supervised_loss_forward(
    logits: int,
    logits_dtype: int,
    cosines: int,
    cosines_dtype: int,
    labels: int,
    by: tuple[float, float, float],
    loss: int,
    inverse_count: int,
    lse_logits: int,
    lse_texts: int,
    B: int,
    C: int,
    threads: int,
    /,
) -> None: ...
def text_supervised_loss_backward(
    logits: int,
    logits_dtype: int,
    cosines: int,
    cosines_dtype: int,
    labels: int,
    lse_logits: int,
    lse_texts: int,
    by: tuple[float, float, float],
    scale: float,
    grad_logits: int,
    grad_cosines: int,
    B: int,
    C: int,
    threads: int,
    /,
) -> None: ...
def two_head_cross_entropy_forward(
    target: tuple[int, int, int, int, int],
    source: tuple[int, int, int, int, int],
    weight: float,
    smoothing: float,
    losses: tuple[int, int, int],
    inverse_counts: int,
    lse: int,
    threads: int,
    /,
) -> None: ...
def two_head_cross_entropy_backward(
    target: tuple[int, int, int, int, int],
    source: tuple[int, int, int, int, int],
    lse: int,
    target_scale: float,
    source_scale: float,
    smoothing: float,
    grad_target: int,
    grad_source: int,
    threads: int,
    /,
) -> None: ...
def concept_boxes(
    feature_map: int,
    dtype: int,
    strides: tuple[int, int, int],
    logits: int,
    labels: int,
    head_weight: int,
    sizes: tuple[int, int, int, int, int],
    rule: list[int],
    centred: bool,
    boxes: int,
    negative_classes: int,
    threads: int,
    /,
) -> None: ...
def l2_sp_forward(parameters: list[tuple[int, int, int, int, int]], threads: int, /) -> float: ...
def l2_sp_backward(
    parameters: list[tuple[int, int, int, int, int]], grads: list[int], scale: float, threads: int, /
) -> None: ...
def lerp_from_bf16(followed: list[tuple[int, int, int]], weight: float, threads: int, /) -> None: ...
def patch_match_info_nce(
    query: int,
    own_key: int,
    labels: int,
    queue: int,
    queue_dtype: int,
    queue_valid: int,
    negative_classes: int,
    positive_pick: int,
    temperature: float,
    negatives_per_set: int,
    epsilon: float,
    rounds: int,
    loss: int,
    grad: int,
    B: int,
    C: int,
    K: int,
    P: int,
    D: int,
    M: int,
    threads: int,
    /,
) -> None: ...
def queue_info_nce_workspace(B: int, N: int, D: int, grad_query: bool, threads: int, /) -> int: ...
def queue_info_nce(
    queries: tuple[int, int, int],
    queue: tuple[int, int, int],
    shape: tuple[int, int, int],
    inverse_temperature: float,
    results: tuple[int, int, int, int],
    workspace: int,
    threads: int,
    /,
) -> None: ...
