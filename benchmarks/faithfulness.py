"""Does a detection depend on what its query attended to? `explain` for the detections of a validation set.

    python benchmarks/faithfulness.py --model CHECKPOINT --dataset data/shapes [--detections 100]

Faithfulness is the area between two curves: the remaining score of a detection when the lowest attention is blurred
first, minus that when the highest is. Random orders are the baseline.
"""

import argparse
import statistics
import time

from measure import machine

from hf_detr import DetrImageProcessor
from hf_detr.data import load_detection_dataset
from hf_detr.interop import load_model
from hf_detr.training import use_all_cores
from hf_detr.visualization import attention_maps, explain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--detections", type=int, default=100)
    args = parser.parse_args()
    use_all_cores()
    model, processor = load_model(args.model), DetrImageProcessor.from_pretrained(args.model)
    dataset = load_detection_dataset(args.dataset, "val", id2label=model.config.id2label, progress=False)
    results, started = [], time.perf_counter()
    for row in dataset:
        for index in range(len(attention_maps(model, row["image"], processor).detections)):
            results.append(explain(model, row["image"], processor, index, progress=False))
        if len(results) >= args.detections:
            break
    seconds = (time.perf_counter() - started) / len(results)
    by_attention = [result.faithfulness for result in results]
    by_chance = [value for result in results for value in result.random_faithfulness]
    print(f"{len(results)} detections, {seconds:.2f} s each; {machine()}")
    print("| | mean | standard deviation | lowest | highest |\n|---|---|---|---|---|")
    for name, values in (("attention", by_attention), ("random orders", by_chance)):
        figures = statistics.mean(values), statistics.stdev(values), min(values), max(values)
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in figures)} |")
    explained = sum(result.is_explained for result in results)
    print(f"Attention is better than all random orders for {explained} of {len(results)} detections.")


if __name__ == "__main__":
    main()
