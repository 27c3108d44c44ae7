"""Names and meanings of the numbers that the trainers log."""

LOGGED_METRICS = {
    "flow/loss": "the image's clipped objective, to be minimised, before its weight",
    "flow/ratio_mean": "mean ratio of the stochastic steps; 1 in the first pass over a generation",
    "flow/log_ratio_std": "spread of the log-ratios, to be held against the clip range; 0 in the first pass",
    "flow/clip_frac": "share of stochastic steps whose ratio is outside of the clip range, on either side",
    "flow/no_gradient_frac": "share of them whose gradient the clip takes away: beyond it on the advantage's side",
    "flow/velocity_mse": "the regulariser, under its name, before its weight: distance to the reference model",
    "grad_norm/text": "norm of the text expert's gradient before clipping",
    "grad_norm/image": "norm of the image expert's gradient before clipping",
    "learning_rate/text": "learning rate that the text expert was stepped with",
    "learning_rate/image": "learning rate that the image expert was stepped with",
    "images/not_finite": "share of images that came out of the VAE as NaN or infinity; they have no reward",
    "images/pixel_std": "mean standard deviation of an image's pixels, 0 to 127.5; near 0 where images turn blank",
    "images/diversity": "mean distance between the thumbnails of a prompt's images, 0 to 1; where there is a gallery",
    "images/dark_share": "share of an image's pixels that are darker than a quarter, 0 to 1",
    "images/bright_share": "share of an image's pixels that are brighter than three quarters, 0 to 1",
    "images/color_entropy": "bits of the histogram of an image's colours, 8 steps each of red, green and blue; 0 to 9",
    "images/edge_density": "share of an image's pixels at which brightness changes by more than a tenth, 0 to 1",
    "images/noise": "standard deviation of an image's noise, estimated from second differences, 0 to 1",
    "images/twins": "share of images that nearly repeat another one of their prompt",
    "images/twins_across": "share of images that nearly repeat one of another prompt, here or a generation before",
    "thinking/repetition": "share of a thinking's four-word phrases that stood in it before, 0 to 1",
    "reward/frac_none": "share of samples that no reward function scored, or that one failed on",
    "process/reward": "mean of the process rewards' weighted sum, where there are process rewards",
    "process/frac_none": "share of thinkings without a process reward, or that one failed on",
    "process/frac_zero_std": "share of thinkings that got the same process reward as all others of their group",
    "time/think": "seconds to sample the thinkings of a generation batch",
    "time/paint": "seconds to sample and decode its images",
    "time/images_per_second": "images of all processes per second of painting",
    "time/reward": "seconds in the reward functions",
    "time/old_and_reference": "seconds for the old and reference velocities",
    "time/update": "seconds of an optimizer step: its forward and backward passes, and the step itself",
}
"""Logged by [`~trl_unigrpo.UniGRPOTrainer`] beside TRL's metrics."""

REFL_METRICS = {
    "reward": "mean reward of the images that one late step points to; in evaluation, of finished images",
    "reward/frac_none": "share of images without a finite reward, or without a finite gradient of it",
    "refl/step": "the step m that carried the gradient, counted from 0",
    "refl/timestep": "its time t, from 1 (noise) to 0 (image)",
    "refl/clamped": "share of pixels beyond black or white, which get no gradient",
    "time/think": "seconds to sample the thinkings of a micro-batch",
    "time/paint": "seconds to denoise its images to the step m",
    "time/reward": "seconds in the reward and its gradient to the pixels",
}
"""Logged by [`~trl_unigrpo.ReFLTrainer`] beside the metrics of every [`~transformers.Trainer`]."""
