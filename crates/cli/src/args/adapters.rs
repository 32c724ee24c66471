//! Adapters on the command line, `FILE[:W][:KEY=VALUE,..]`, and the plugins that read them.

use super::headings::ADAPTERS;
use clap::{Args, Subcommand, ValueEnum};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Where plugins are found.
#[derive(Debug, Clone, Default, Args)]
pub struct PluginSearchArgs {
    /// Folder to search for plugins before the program's own; may be repeated.
    #[arg(long, value_name = "DIR", help_heading = ADAPTERS)]
    pub plugin_dir: Vec<PathBuf>,
    /// Use no plugins, not even those that are linked into the program.
    #[arg(long, help_heading = ADAPTERS)]
    pub no_plugins: bool,
}

/// `clearform plugins`.
#[derive(Debug, Args)]
pub struct PluginsArgs {
    /// What to do about plugins.
    #[command(subcommand)]
    pub action: PluginsAction,
}

/// What to do about plugins.
#[derive(Debug, Subcommand)]
pub enum PluginsAction {
    /// List the plugins in --plugin-dir, next to the program and linked into it.
    #[command(after_help = "Example:\n  clearform plugins list --plugin-dir plugins")]
    List(PluginSearchArgs),
    /// Load a plugin and run the examples it declares.
    #[command(after_help = "Example:\n  clearform plugins check plugins/libclearform_mine.so")]
    Check(PluginCheckArgs),
}

/// `clearform plugins check`.
#[derive(Debug, Args)]
pub struct PluginCheckArgs {
    /// The plugin's shared library, or the id of a listed plugin.
    #[arg(value_name = "FILE|ID")]
    pub plugin: PathBuf,
    /// Where a plugin with an id is.
    #[command(flatten)]
    pub search: PluginSearchArgs,
}

/// Adapters that edit weights.
#[derive(Debug, Clone, Default, Args)]
pub struct WeightAdapterArgs {
    /// LoRA, LoHa or LoKr with strength W (default 1); KEY=W sets that of blocks whose names contain KEY instead
    /// (double=1,single=0.5). May be repeated.
    #[arg(long, value_name = "FILE[:W][:KEY=W,..]", help_heading = ADAPTERS)]
    pub lora: Vec<AdapterArg>,
    /// How low-rank edits are applied to the weights.
    #[arg(long, value_enum, default_value = "at-runtime", value_name = "MODE", help_heading = ADAPTERS)]
    pub lora_apply_mode: ApplyMode,
    /// Continue although tensors of an adapter do not match the model.
    #[arg(long, help_heading = ADAPTERS)]
    pub allow_partial: bool,
    /// Where plugins are.
    #[command(flatten)]
    pub plugins: PluginSearchArgs,
}

/// Adapters of every kind.
#[derive(Debug, Clone, Default, Args)]
pub struct AdapterArgs {
    /// Those that edit weights.
    #[command(flatten)]
    pub weights: WeightAdapterArgs,
    /// Adapter of any kind; the plugin that recognises it is used, or the one named by ,plugin=ID. May be repeated.
    #[arg(long, value_name = "FILE[:W][,plugin=ID]", help_heading = ADAPTERS)]
    pub adapter: Vec<AdapterArg>,
    /// ControlNet with conditioning scale W; start and end (0 to 1) limit the steps it acts in, mode selects the
    /// control mode of a union ControlNet. May be repeated.
    #[arg(long, value_name = "PATH[:W][:start=X,end=X,mode=N]", help_heading = ADAPTERS)]
    pub controlnet: Vec<AdapterArg>,
    /// Attention plan of ControlNets: `full` or `clear:r=R`.
    #[arg(long, default_value = "full", value_name = "PLAN", help_heading = ADAPTERS)]
    pub controlnet_attention: String,
}

/// How low-rank edits are applied to weights.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum ApplyMode {
    /// As separate products next to the weights: exact in every dtype.
    #[default]
    #[value(alias = "at_runtime")]
    AtRuntime,
    /// Merged into the weights when they are loaded: slightly faster.
    Immediately,
}

/// An adapter as the user gives it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AdapterArg {
    /// File or folder.
    pub path: PathBuf,
    /// Strength.
    pub strength: Option<f64>,
    /// `KEY=VALUE` settings, in order.
    pub settings: Vec<(String, String)>,
}

impl FromStr for AdapterArg {
    type Err = String;

    /// The path ends at the first separator after which only a strength and settings follow: paths may contain colons
    /// and commas themselves. One that exists as it is written is taken as it is.
    fn from_str(text: &str) -> Result<Self, String> {
        let separators = text.match_indices([':', ',']).map(|(at, _)| at);
        if text.is_empty() {
            return Err("expected a file".to_owned());
        }
        if Path::new(text).exists() {
            return Ok(Self { path: PathBuf::from(text), ..Self::default() });
        }
        let ends: Vec<usize> = separators.filter(|at| *at > 0).collect();
        let parsed = ends.iter().find_map(|at| Self::with_settings(&text[..*at], &text[at + 1..]));
        let parsed = parsed.unwrap_or_else(|| Self { path: PathBuf::from(text), ..Self::default() });
        match ends.iter().find(|at| Path::new(&text[..**at]).exists()) {
            Some(at) if !parsed.path.exists() => Err(format!(
                "expected a strength or KEY=VALUE settings after {}, found {:?}",
                &text[..*at],
                &text[*at..]
            )),
            _ => parsed.with_each_key_once(),
        }
    }
}

impl AdapterArg {
    /// The adapter at `path` with the strength and settings in `rest`; none if `rest` holds anything else.
    fn with_settings(path: &str, rest: &str) -> Option<Self> {
        let mut parsed = Self { path: PathBuf::from(path), ..Self::default() };
        for item in rest.split([':', ',']) {
            match (item.split_once('='), item.parse::<f64>()) {
                (Some((key, value)), _) if is_key(key) => parsed.settings.push((key.to_owned(), value.to_owned())),
                (None, Ok(weight)) if parsed.strength.is_none() => parsed.strength = Some(weight),
                _ => return None,
            }
        }
        Some(parsed)
    }

    fn with_each_key_once(self) -> Result<Self, String> {
        let mut keys: Vec<&String> = self.settings.iter().map(|(key, _)| key).collect();
        keys.sort();
        match keys.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(format!("{} is set twice", pair[0])),
            None => Ok(self),
        }
    }
}

fn is_key(key: &str) -> bool {
    !key.is_empty() && key.chars().all(|letter| letter.is_ascii_alphanumeric() || "_.-*".contains(letter))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_parse_into_path_strength_and_settings() {
        type Case<'a> = (&'a str, &'a str, Option<f64>, &'a [(&'a str, &'a str)]);
        let cases: [Case; 9] = [
            ("a.safetensors", "a.safetensors", None, &[]),
            ("a.safetensors:0.8", "a.safetensors", Some(0.8), &[]),
            ("a:0.8:double=1,single=0.5", "a", Some(0.8), &[("double", "1"), ("single", "0.5")]),
            ("a:-1", "a", Some(-1.0), &[]),
            // Out of range, which the library says.
            ("a:inf", "a", Some(f64::INFINITY), &[]),
            ("a,plugin=example", "a", None, &[("plugin", "example")]),
            ("C:/x, y/a:1,plugin=lora", "C:/x, y/a", Some(1.0), &[("plugin", "lora")]),
            ("net:start=0.2,end=0.8,mode=3", "net", None, &[("start", "0.2"), ("end", "0.8"), ("mode", "3")]),
            ("a:b", "a:b", None, &[]),
        ];
        for (text, path, weight, settings) in cases {
            let settings = settings.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
            let expected = AdapterArg { path: PathBuf::from(path), strength: weight, settings };
            assert_eq!(text.parse::<AdapterArg>(), Ok(expected), "{text}");
        }
        assert!("".parse::<AdapterArg>().is_err());
        let twice = "a:1:double=1,double=2".parse::<AdapterArg>().unwrap_err();
        assert!(twice.contains("double is set twice"), "{twice}");
        let exists = env!("CARGO_MANIFEST_DIR");
        for rest in [":", ":0.8:double", ":0.8:0.9"] {
            let error = format!("{exists}{rest}").parse::<AdapterArg>().unwrap_err();
            assert!(error.contains(&format!("after {exists}, found {rest:?}")), "{error}");
        }
    }
}
