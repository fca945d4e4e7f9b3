"""Scores of the mini set: an answer is right or wrong."""

import evaluate


def exact(doc, results):
    """Right where the first line of the answer is the expected one."""
    said = results[0].strip().split("\n")[0].strip().rstrip(".")
    return {"acc": float(said == doc["answer"])}


def passes(doc, results):
    """Right where the completed function passes its tests: runs what the model wrote."""
    program = doc["prompt"] + results[0]
    shares, _ = evaluate.load("code_eval").compute(references=[doc["tests"]], predictions=[[program]], k=[1])
    return {"acc": float(shares["pass@1"])}
