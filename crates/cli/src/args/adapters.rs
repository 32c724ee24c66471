//! Adapters on the command line, `FILE[:W][:KEY=VALUE,..]`, and the plugins that read them.

use clap::{Args, Subcommand, ValueEnum};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Which plugins there are.
#[derive(Debug, Clone, Default, Args)]
pub struct PluginSearchArgs {
    /// A folder of plugins, looked through before that of the program. May be given several times.
    #[arg(long, value_name = "DIR")]
    pub plugin_dir: Vec<PathBuf>,
    /// Load no plugin, whatever is asked for.
    #[arg(long)]
    pub no_plugins: bool,
}

/// `clearform plugins`.
#[derive(Debug, Args)]
pub struct PluginsArgs {
    /// Which.
    #[command(subcommand)]
    pub action: PluginsAction,
}

/// What to do about plugins.
#[derive(Debug, Subcommand)]
pub enum PluginsAction {
    /// Every plugin beside the binary.
    List(PluginSearchArgs),
    /// Load a plugin and run the examples that it declares.
    Check {
        /// The library.
        path: PathBuf,
    },
}

/// Adapters that edit weights.
#[derive(Debug, Clone, Default, Args)]
pub struct WeightAdapterArgs {
    /// LoRA or its kin. W is its strength; KEY=W sets that of blocks whose names hold KEY (double=1,single=0.5).
    #[arg(long, value_name = "FILE[:W][:KEY=W,..]")]
    pub lora: Vec<AdapterArg>,
    /// How a LoRA meets the weights.
    #[arg(long, value_enum, default_value = "at-runtime")]
    pub lora_apply_mode: ApplyMode,
    /// Go on although tensors of an adapter do not meet the model.
    #[arg(long)]
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
    /// Any adapter; the plugin that knows it is found, or named with ,plugin=ID.
    #[arg(long, value_name = "FILE[:W][,plugin=ID]")]
    pub adapter: Vec<AdapterArg>,
    /// ControlNet. W is its conditioning scale; start and end, 0 to 1, say when it acts; mode is that of a union.
    #[arg(long, value_name = "PATH[:W][:start=X,end=X,mode=N]")]
    pub controlnet: Vec<AdapterArg>,
    /// Attention of ControlNets: `full` or `clear:r=R`.
    #[arg(long, default_value = "full", value_name = "PLAN")]
    pub controlnet_attention: String,
}

/// How low-rank edits meet weights.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum ApplyMode {
    /// Beside them: exact whatever their number format.
    #[default]
    #[value(alias = "at_runtime")]
    AtRuntime,
    /// Added to them when they are loaded: a little faster.
    Immediately,
}

/// An adapter as the person gives it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AdapterArg {
    /// File or folder.
    pub path: PathBuf,
    /// Strength.
    pub weight: Option<f64>,
    /// What else is said, in order.
    pub settings: Vec<(String, String)>,
}

impl FromStr for AdapterArg {
    type Err = String;

    /// The path ends where all that follows are numbers and settings: paths may hold colons and commas themselves.
    fn from_str(text: &str) -> Result<Self, String> {
        let separators = text.match_indices([':', ',']).map(|(at, _)| at);
        let read = separators.filter(|at| *at > 0).find_map(|at| Self::read(&text[..at], &text[at + 1..]));
        match read {
            Some(read) => Ok(read),
            None if text.is_empty() => Err("expected a file".to_owned()),
            None => Ok(Self { path: PathBuf::from(text), ..Self::default() }),
        }
    }
}

impl fmt::Display for AdapterArg {
    /// As it is given, with the file's name alone.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.file_name().unwrap_or_default().to_string_lossy())?;
        self.weight.map_or(Ok(()), |weight| write!(f, ":{weight}"))?;
        let settings: Vec<String> = self.settings.iter().map(|(key, value)| format!("{key}={value}")).collect();
        if settings.is_empty() { Ok(()) } else { write!(f, ":{}", settings.join(",")) }
    }
}

impl fmt::Display for AdapterArgs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let given = [("--lora", &self.weights.lora), ("--controlnet", &self.controlnet), ("--adapter", &self.adapter)];
        let each = given.iter().flat_map(|(flag, args)| args.iter().map(move |arg| format!("{flag} {arg}")));
        f.write_str(&each.collect::<Vec<_>>().join(" "))
    }
}

impl AdapterArg {
    fn read(path: &str, rest: &str) -> Option<Self> {
        let mut read = Self { path: PathBuf::from(path), ..Self::default() };
        for item in rest.split([':', ',']) {
            match (item.split_once('='), item.parse::<f64>()) {
                (Some((key, value)), _) if is_key(key) => read.settings.push((key.to_owned(), value.to_owned())),
                (None, Ok(weight)) if weight.is_finite() && read.weight.is_none() => read.weight = Some(weight),
                _ => return None,
            }
        }
        Some(read)
    }
}

fn is_key(key: &str) -> bool {
    !key.is_empty() && key.chars().all(|one| one.is_ascii_alphanumeric() || "_.-*".contains(one))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_adapter_is_a_path_with_what_follows() {
        type Case<'a> = (&'a str, &'a str, Option<f64>, &'a [(&'a str, &'a str)]);
        let cases: [Case; 8] = [
            ("a.safetensors", "a.safetensors", None, &[]),
            ("a.safetensors:0.8", "a.safetensors", Some(0.8), &[]),
            ("a:0.8:double=1,single=0.5", "a", Some(0.8), &[("double", "1"), ("single", "0.5")]),
            ("a:-1", "a", Some(-1.0), &[]),
            ("a,plugin=example", "a", None, &[("plugin", "example")]),
            ("C:/x, y/a:1,plugin=lora", "C:/x, y/a", Some(1.0), &[("plugin", "lora")]),
            ("net:start=0.2,end=0.8,mode=3", "net", None, &[("start", "0.2"), ("end", "0.8"), ("mode", "3")]),
            ("a:b", "a:b", None, &[]),
        ];
        for (text, path, weight, settings) in cases {
            let settings = settings.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
            let expected = AdapterArg { path: PathBuf::from(path), weight, settings };
            assert_eq!(text.parse::<AdapterArg>(), Ok(expected), "{text}");
        }
        assert!("".parse::<AdapterArg>().is_err());
        assert_eq!(
            "x/a:0.8:double=1,single=0.5".parse::<AdapterArg>().unwrap().to_string(),
            "a:0.8:double=1,single=0.5"
        );
    }
}
