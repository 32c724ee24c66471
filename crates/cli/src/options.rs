//! From parsed arguments to the library's options.

use crate::args::{
    AdapterArg, AdapterArgs, ApplyMode, ComponentFileArgs, DtypeArg, Duration, LossWeights, MemoryArgs,
    PluginSearchArgs, PrecisionArg, SamplingArgs, SourceArgs, Steps, TrainingArgs, VaeArgs, WeightAdapterArgs,
};
use anyhow::{Context as _, bail};
use clearform::evaluation::EvaluationOptions;
use clearform::{
    AdapterKind, AdapterOptions, AdapterSpec, ComponentFiles, FloatDtype, LoraApplyMode, MemoryOptions, Overwrite,
    PluginOptions, Precision, SourceOptions, TrainingOptions, VaeTiling,
};

/// What `--overwrite` allows.
pub fn overwrite_if(given: bool) -> Overwrite {
    if given { Overwrite::PortableModel } else { Overwrite::Never }
}

impl From<&SourceArgs> for SourceOptions {
    fn from(args: &SourceArgs) -> Self {
        Self {
            config: args.config.clone(),
            family: args.family.clone(),
            variant: args.variant.clone(),
            manifest: args.manifest.clone(),
            allow_unmatched: args.allow_unmatched,
            ..Self::default()
        }
    }
}

impl From<DtypeArg> for FloatDtype {
    fn from(arg: DtypeArg) -> Self {
        match arg {
            DtypeArg::F32 => Self::F32,
            DtypeArg::Bf16 => Self::Bf16,
            DtypeArg::F16 => Self::F16,
        }
    }
}

impl From<PrecisionArg> for Precision {
    fn from(arg: PrecisionArg) -> Self {
        match arg {
            PrecisionArg::F32 => Self::F32,
            PrecisionArg::Bf16 => Self::Bf16,
        }
    }
}

impl TrainingArgs {
    /// The options, with those of memory, which stand elsewhere.
    pub fn options(&self, memory: &MemoryArgs) -> TrainingOptions {
        TrainingOptions {
            prompts: self.prompts.clone(),
            samples: self.samples.clone(),
            sample_count: self.sample_count,
            held_out: self.held_out,
            sample_steps: self.sample_steps,
            sample_size: self.sample_size,
            steps: self.steps.and_then(Steps::count),
            until_flat: self.steps == Some(Steps::Auto),
            time: self.time.map(|Duration(seconds)| seconds),
            batch: self.batch,
            accumulate: self.accumulate,
            learning_rate: self.lr,
            losses: self.losses.map(|LossWeights(weights)| weights),
            attention_every: self.attention_every,
            precision: self.precision.map(Into::into),
            keep_activations: self.keep_activations,
            checkpoint_every: self.checkpoint_every,
            images_every: self.images_every,
            memory: memory.into(),
            seed: self.seed,
            resume: self.resume,
        }
    }
}

impl SamplingArgs {
    /// The options, with those of memory, which stand elsewhere.
    pub fn options(&self, memory: &MemoryArgs) -> EvaluationOptions {
        EvaluationOptions {
            prompts: self.prompts.clone(),
            components: self.components.clone(),
            component_files: (&self.component_files).into(),
            control_images: self.control_image.clone(),
            size: self.size,
            steps: self.steps,
            seed: self.seed.number,
            memory: memory.into(),
        }
    }
}

impl From<&VaeArgs> for VaeTiling {
    fn from(args: &VaeArgs) -> Self {
        Self { mode: args.vae_tiling, tile_size: args.vae_tile_size.map(|size| size as usize) }
    }
}

impl From<&MemoryArgs> for MemoryOptions {
    fn from(args: &MemoryArgs) -> Self {
        Self { limit: args.max_memory.0, offload: args.offload }
    }
}

impl From<&ComponentFileArgs> for ComponentFiles {
    fn from(args: &ComponentFileArgs) -> Self {
        Self {
            vae: args.vae.clone(),
            tae: args.tae.clone(),
            clip_l: args.clip_l.clone(),
            clip_g: args.clip_g.clone(),
            t5xxl: args.t5xxl.clone(),
        }
    }
}

impl From<&PluginSearchArgs> for PluginOptions {
    fn from(args: &PluginSearchArgs) -> Self {
        Self { folders: args.plugin_dir.clone(), disabled: args.no_plugins }
    }
}

impl WeightAdapterArgs {
    /// Adapters that edit weights.
    pub fn options(&self) -> anyhow::Result<AdapterOptions> {
        let adapters = self.lora.iter().map(|arg| adapter_spec(arg, AdapterKind::Lora));
        Ok(AdapterOptions {
            adapters: adapters.collect::<anyhow::Result<_>>()?,
            apply_mode: match self.lora_apply_mode {
                ApplyMode::AtRuntime => LoraApplyMode::AtRuntime,
                ApplyMode::Immediately => LoraApplyMode::Immediately,
            },
            allow_partial: self.allow_partial,
            controlnet_attention: None,
            plugins: (&self.plugins).into(),
        })
    }
}

impl AdapterArgs {
    /// Adapters of every kind: LoRAs, ControlNets, then the others.
    pub fn options(&self) -> anyhow::Result<AdapterOptions> {
        let mut options = self.weights.options()?;
        let controlnets = self.controlnet.iter().map(|arg| adapter_spec(arg, AdapterKind::ControlNet));
        let others = self.adapter.iter().map(|arg| adapter_spec(arg, AdapterKind::Any));
        for adapter in controlnets.chain(others) {
            options.adapters.push(adapter?);
        }
        options.controlnet_attention = Some(self.controlnet_attention.clone());
        Ok(options)
    }
}

fn adapter_spec(arg: &AdapterArg, kind: AdapterKind) -> anyhow::Result<AdapterSpec> {
    let mut spec = AdapterSpec::new(&arg.path, kind).with_strength(arg.strength.unwrap_or(1.0));
    for (key, value) in &arg.settings {
        let number = || value.parse::<f64>().ok();
        let not_a_number = || format!("{}: {key}={value}: expected a number", arg.path.display());
        match (key.as_str(), kind == AdapterKind::ControlNet) {
            ("plugin", _) => spec.plugin = Some(value.clone()),
            ("start", true) => spec.interval[0] = number().with_context(not_a_number)?,
            ("end", true) => spec.interval[1] = number().with_context(not_a_number)?,
            ("mode", true) => spec.mode = Some(value.parse().with_context(not_a_number)?),
            (_, true) => bail!("{}: {key}: expected start, end, mode or plugin", arg.path.display()),
            (block, false) => spec.block_strengths.push((block.to_owned(), number().with_context(not_a_number)?)),
        }
    }
    Ok(spec)
}
