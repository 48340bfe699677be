"""The LSTM forward against libraries that run models and train none: onnxruntime and OpenVINO.

    python benchmarks/sweep.py --seed 1 --what inference

All take the same weights and inputs and must agree before they are timed. Each has the layout that
its operator asks for: x (T, B, D) in ONNX, (B, T, D) in OpenVINO, and time-major in ours. All have
as many threads, onnxruntime's asleep between two calls so that they slow nobody else.
"""

from functools import partial

import numpy as np

from benchmarks import lstm, timing
from rnnattn import interop

PACKAGES = ["jax", "jaxlib", "numpy", "onnxruntime", "openvino"]
KINDS = ("forward",)


def _require_float32(problem):
    if problem.x.dtype != np.float32:
        raise timing.Unavailable("the model is written in float32")


def ours(problem: lstm.Problem) -> timing.Programs:
    return {"forward": lstm.ours(problem)["forward"]}


def onnxruntime(problem: lstm.Problem) -> timing.Programs:
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    _require_float32(problem)
    (T, B, D), H = problem.x.shape, problem.dy.shape[-1]
    weights = interop.lstm_to_onnx(problem.params)
    sizes = {"x": [T, B, D], "y": [T, 1, B, H], "h": [1, B, H], "c": [1, B, H]}
    described = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in sizes.items()
    }
    node = helper.make_node("LSTM", ["x", *weights], ["y", "h", "c"], hidden_size=H)
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    x, *results = described.values()
    graph = helper.make_graph([node], "lstm", [x], results, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = timing.cores()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    run = partial(session.run, None, {"x": np.asarray(problem.x)})
    return {"forward": timing.Program(run, wait=lambda results: [results[0][:, 0]])}


def openvino(problem: lstm.Problem) -> timing.Programs:
    import openvino as ov
    from openvino import opset13 as ops

    _require_float32(problem)
    (T, B, D), H = problem.x.shape, problem.dy.shape[-1]
    # gates in the order f, i, g, o; one direction
    blocks = [1, 0, 2, 3]
    ordered = lambda w: np.concatenate([np.split(np.asarray(w), 4, -1)[k] for k in blocks], -1)
    matrix = lambda w: ops.constant(np.ascontiguousarray(ordered(w).T)[None])
    x = ops.parameter([B, T, D], np.float32)
    zeros = ops.constant(np.zeros((B, 1, H), np.float32))
    node = ops.lstm_sequence(
        *(x, zeros, zeros, ops.constant(np.full(B, T, np.int32))),
        *(matrix(problem.params.w_x), matrix(problem.params.w_h)),
        *(ops.constant(ordered(problem.params.b)[None]), H, "forward"),
    )
    settings = {"INFERENCE_NUM_THREADS": timing.cores(), "INFERENCE_PRECISION_HINT": "f32"}
    settings["PERFORMANCE_HINT"] = "LATENCY"
    model = ov.compile_model(ov.Model(node.outputs(), [x]), "CPU", settings)
    request = model.create_infer_request()
    request.set_input_tensor(ov.Tensor(np.ascontiguousarray(np.swapaxes(problem.x, 0, 1))))

    def run():
        request.infer()
        return request.get_output_tensor(0).data

    return {"forward": timing.Program(run, wait=lambda y: [np.swapaxes(y[:, 0], 0, 1)])}


PEERS = {"onnxruntime": onnxruntime, "openvino": openvino}


def outputs(programs: timing.Programs):
    y, *_ = programs["forward"].call()
    return {"y": y}
