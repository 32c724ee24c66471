//! Opens the adapters that the arguments name. Plugins are searched for only if there is an adapter.

use crate::args::{AdapterArg, AdapterArgs, ApplyMode, PluginSearchArgs, WeightAdapterArgs};
use crate::bundled_plugins::BUNDLED_PLUGINS;
use crate::output::Output;
use anyhow::{Context as _, bail};
use clearform_plugin_host::{
    ADAPTER_INTERFACE, AdapterReport, CONTROLNET_INTERFACE, LowRankMode, PluginChoice, PluginRegistry, Strength,
};
use clearform_runtime::{ActiveControlNet, AdapterRequest, Adapters, ControlNetSchedule, RgbImage};
use std::path::PathBuf;

/// The plugins in the given folders, then those next to the program, then those that are linked into it.
pub fn plugin_registry(search: &PluginSearchArgs) -> anyhow::Result<PluginRegistry> {
    if search.no_plugins {
        return Ok(PluginRegistry::disabled());
    }
    let program = std::env::current_exe().context("finding the program's folder")?;
    let program_folder = program.parent().map(|folder| folder.to_owned());
    let folders: Vec<PathBuf> = search.plugin_dir.iter().cloned().chain(program_folder).collect();
    Ok(PluginRegistry::scan(&folders)?.with_linked(&BUNDLED_PLUGINS))
}

/// Opens adapters that edit weights.
pub fn open_weight_adapters(args: &WeightAdapterArgs) -> anyhow::Result<Adapters> {
    let requests = args.lora.iter().map(|arg| request(arg, Some(ADAPTER_INTERFACE))).collect::<anyhow::Result<_>>()?;
    open(requests, args)
}

/// Opens adapters of every kind.
pub fn open_all(args: &AdapterArgs) -> anyhow::Result<Adapters> {
    let weights = args.weights.lora.iter().map(|arg| request(arg, Some(ADAPTER_INTERFACE)));
    let controlnets = args.controlnet.iter().map(|arg| request(arg, Some(CONTROLNET_INTERFACE)));
    let of_any_kind = args.adapter.iter().map(|arg| request(arg, None));
    let requests = weights.chain(controlnets).chain(of_any_kind).collect::<anyhow::Result<_>>()?;
    let mut adapters = open(requests, &args.weights)?;
    adapters.controlnet_attention.clone_from(&args.controlnet_attention);
    Ok(adapters)
}

/// Prints how many tensors of each adapter were applied, and the plugins' notes.
pub fn print_reports(reports: &[AdapterReport], controlnets: &[ActiveControlNet], output: &Output) {
    for report in reports {
        report.notes.iter().for_each(|note| output.note(note));
        output.note(report);
    }
    controlnets.iter().flat_map(|active| active.controlnet.notes()).for_each(|note| output.note(note));
}

/// The images of `--control-image`.
pub fn load_control_images(paths: &[PathBuf]) -> anyhow::Result<Vec<RgbImage>> {
    let load = |path: &PathBuf| -> anyhow::Result<_> {
        Ok(image::open(path).with_context(|| format!("--control-image {}", path.display()))?.to_rgb8())
    };
    paths.iter().map(load).collect()
}

fn open(requests: Vec<AdapterRequest>, args: &WeightAdapterArgs) -> anyhow::Result<Adapters> {
    if requests.is_empty() {
        return Ok(Adapters::default());
    }
    let mut adapters = Adapters::open(&requests, &plugin_registry(&args.plugins)?)?;
    adapters.allow_partial = args.allow_partial;
    adapters.low_rank = match args.lora_apply_mode {
        ApplyMode::AtRuntime => LowRankMode::Separate,
        ApplyMode::Immediately => LowRankMode::Fused,
    };
    Ok(adapters)
}

fn request(arg: &AdapterArg, interface: Option<&'static str>) -> anyhow::Result<AdapterRequest> {
    let mut request = AdapterRequest {
        path: arg.path.clone(),
        strength: Strength { overall: arg.strength.unwrap_or(1.0), blocks: Vec::new() },
        choice: PluginChoice { interface, id: None },
        schedule: ControlNetSchedule::default(),
    };
    for (key, value) in &arg.settings {
        let number = || value.parse::<f64>().ok().filter(|number| number.is_finite());
        let not_a_number = || format!("{}: {key}={value}: expected a number", arg.path.display());
        match (key.as_str(), interface == Some(CONTROLNET_INTERFACE)) {
            ("plugin", _) => request.choice.id = Some(value.clone()),
            ("start", true) => request.schedule.interval[0] = number().with_context(not_a_number)?,
            ("end", true) => request.schedule.interval[1] = number().with_context(not_a_number)?,
            ("mode", true) => request.schedule.mode = Some(value.parse().with_context(not_a_number)?),
            (_, true) => bail!("{}: {key}: expected start, end, mode or plugin", arg.path.display()),
            (block, false) => request.strength.blocks.push((block.to_owned(), number().with_context(not_a_number)?)),
        }
    }
    Ok(request)
}
