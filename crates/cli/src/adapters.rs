//! From arguments to open adapters. Plugins are looked for only where an adapter is asked for.

use crate::args::{AdapterArg, AdapterArgs, ApplyMode, PluginSearchArgs, WeightAdapterArgs};
use crate::output::Output;
use anyhow::{Context as _, bail};
use clearform_plugin_host::{
    ADAPTER_INTERFACE, AdapterReport, CONTROLNET_INTERFACE, LowRankMode, PluginChoice, PluginRegistry, Strength,
};
use clearform_runtime::{ActiveControlNet, AdapterRequest, Adapters, ControlNetSchedule, RgbImage};
use std::path::PathBuf;

/// The plugins that these arguments lead to: those of the folders given, then those beside the program.
pub fn registry(search: &PluginSearchArgs) -> anyhow::Result<PluginRegistry> {
    if search.no_plugins {
        return Ok(PluginRegistry::off());
    }
    let program = std::env::current_exe().context("the program's own folder")?;
    let beside = program.parent().map(|folder| folder.to_owned());
    Ok(PluginRegistry::look(&search.plugin_dir.iter().cloned().chain(beside).collect::<Vec<_>>())?)
}

/// Opens adapters that edit weights.
pub fn open_weights(args: &WeightAdapterArgs) -> anyhow::Result<Adapters> {
    let requests = args.lora.iter().map(|arg| request(arg, Some(ADAPTER_INTERFACE))).collect::<anyhow::Result<_>>()?;
    open(requests, args)
}

/// Opens adapters of every kind.
pub fn open_all(args: &AdapterArgs) -> anyhow::Result<Adapters> {
    let weights = args.weights.lora.iter().map(|arg| request(arg, Some(ADAPTER_INTERFACE)));
    let nets = args.controlnet.iter().map(|arg| request(arg, Some(CONTROLNET_INTERFACE)));
    let any = args.adapter.iter().map(|arg| request(arg, None));
    let mut adapters = open(weights.chain(nets).chain(any).collect::<anyhow::Result<_>>()?, &args.weights)?;
    adapters.branch_attention.clone_from(&args.controlnet_attention);
    Ok(adapters)
}

/// Tells the person what became of each adapter, and what the plugins have to say.
pub fn tell(reports: &[AdapterReport], controlnets: &[ActiveControlNet], output: &Output) {
    for report in reports {
        report.notes.iter().for_each(|note| output.note(note));
        output.note(report);
    }
    controlnets.iter().flat_map(|schedule| schedule.controlnet.notes()).for_each(|note| output.note(note));
}

/// The pictures of `--control-image`.
pub fn control_images(paths: &[PathBuf]) -> anyhow::Result<Vec<RgbImage>> {
    let open = |path: &PathBuf| -> anyhow::Result<_> {
        Ok(image::open(path).with_context(|| format!("--control-image {}", path.display()))?.to_rgb8())
    };
    paths.iter().map(open).collect()
}

fn open(requests: Vec<AdapterRequest>, args: &WeightAdapterArgs) -> anyhow::Result<Adapters> {
    if requests.is_empty() {
        return Ok(Adapters::default());
    }
    let mut adapters = Adapters::open(&requests, &registry(&args.plugins)?)?;
    adapters.allow_partial = args.allow_partial;
    adapters.low_rank = match args.lora_apply_mode {
        ApplyMode::AtRuntime => LowRankMode::Beside,
        ApplyMode::Immediately => LowRankMode::Fused,
    };
    Ok(adapters)
}

fn request(arg: &AdapterArg, interface: Option<&'static str>) -> anyhow::Result<AdapterRequest> {
    let mut request = AdapterRequest {
        path: arg.path.clone(),
        strength: Strength { whole: arg.weight.unwrap_or(1.0), blocks: Vec::new() },
        choice: PluginChoice { interface, id: None },
        schedule: ControlNetSchedule::default(),
    };
    for (key, value) in &arg.settings {
        let number = || value.parse::<f64>().ok().filter(|number| number.is_finite());
        let wrong = || format!("{}: {key}={value}: expected a number", arg.path.display());
        match (key.as_str(), interface == Some(CONTROLNET_INTERFACE)) {
            ("plugin", _) => request.choice.id = Some(value.clone()),
            ("start", true) => request.schedule.interval[0] = number().with_context(wrong)?,
            ("end", true) => request.schedule.interval[1] = number().with_context(wrong)?,
            ("mode", true) => request.schedule.mode = Some(value.parse().with_context(wrong)?),
            (_, true) => bail!("{}: {key}: expected start, end, mode or plugin", arg.path.display()),
            (block, false) => request.strength.blocks.push((block.to_owned(), number().with_context(wrong)?)),
        }
    }
    Ok(request)
}
