"""A child of the kernel check that misbehaves as it is told; `wrong` runs the real check."""

import json
import os
import signal
import sys
import time


def main(behaviour: str, request: str) -> int:
    if behaviour == "wrong":
        return check_a_wrong_kernel(request)
    if behaviour != "no device":
        print(json.dumps({"device": "a GPU"}), flush=True)
    print("a library says hello", flush=True)
    match behaviour:
        case "hang":
            time.sleep(600)
        case "fault":
            print("CUDA_ERROR_ILLEGAL_ADDRESS", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGABRT)
        case "no device":
            print("all CUDA-capable devices are busy", file=sys.stderr)
            return 1
        case "right":
            print(json.dumps({"report": {"max_error": 1e-3, "failure": None, "seconds": 2.0}}))
    return 0


def check_a_wrong_kernel(request: str) -> int:
    from dataclasses import replace

    from pallas_kernels.dispatch import KernelSet
    from pallas_kernels.paged_attention import check_main, reference

    def forgets_a_head(*args):
        out_TKGH, pages_PKBC = reference.paged_attention(*args)
        return out_TKGH.at[:, 0, 0].set(0), pages_PKBC

    def choose(asked: check_main.CheckRequest) -> KernelSet:
        kernels = check_main.choose_asked(asked)
        return replace(kernels, plan_attention=reference.plan, paged_attention=forgets_a_head)

    return check_main.main([request], choose=choose)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
