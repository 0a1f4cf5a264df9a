"""The family on one task: what each method learns in the same steps, what it costs, and what it forgets.

    python benchmarks/methods.py                   whatever is missing, then the table and the figures
    python benchmarks/methods.py --methods lora ia3    of these alone
    python benchmarks/methods.py --report          the table and the figures again, from benchmarks/methods.json
    python benchmarks/methods.py --workers 2       two cells at a time, each with one thread

The task is orders (train/orders): nested JSON, of which parts are not said. SmolLM2-135M, the same 48 steps of 8 orders
for every method, 100 test orders whose names and shapes no training order has. Each cell is a process of its own and is
written into benchmarks/methods.json when it is done: kill this at any time, it goes on where it was.

rates    each method has its own learning rate: from a first one it is multiplied and divided by 3 until the best, by
         the loss on orders that are neither trained on nor tested, has a worse one on either side (seed 0).
seeds    at that rate seeds 0, 1 and 2: of the data, the order and the start of the adapter.
ranks    LoRA with r from 1 to 64, alpha = 2 r, at LoRA's rate, the same three seeds.
costs    a step's seconds and peak memory, and an answer's seconds live and merged: each round all methods by turns, in
         processes with nothing beside them; --costs measures them, and asks for a quiet machine.
"""
