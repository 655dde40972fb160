"""First light: what every kernel computes on a GPU, and how fast, in ten minutes: ``tools/first_light.sh``.

Parts, by worth, each within its own time and what those before it have left over (`plan`):

1. The package with its CUDA library is built for this GPU (`building`) beside 2, or a library from elsewhere is taken.
2. Every operator and stage in float32, float16 and bfloat16 beside float64, forward and backward, at three sizes,
   stages at every width of both networks; the golden network. Triton first, CUDA C++ once it is built (`truth`).
3. Inference of both networks at three sizes, eager, `torch.compile`, ours, ours as a CUDA graph; a training step; Table
   6's memory (`speed`).
4. Stages beside the copy bandwidth, Triton beside CUDA C++ (`speed`).
5. compute-sanitizer over each CUDA kernel, results twice the same, offsets past 32 bits (`safety`).

What is run is a `Task`; tasks run in processes of their own (`pool`, `worker`). A wrong number, an exception, a crash,
a hang, no memory and no time left are rows like any other, and the rest goes on. Rows are written as they come, a line
of JSON each; after each part all of them are put into results.json, beside a report (`report`).
"""
