//! The text of a PTX module as statements; what an instruction means is not known here.

use std::collections::HashMap;

/// A module: its kernels as text, which are taken apart when one is asked for, and its variables.
pub struct Module {
    text: String,
    /// Where the signature and the body of each kernel lie.
    kernels: HashMap<String, (usize, usize)>,
    /// What it was compiled for, `sm_80`.
    pub target: String,
    /// Declarations outside of functions, `.shared .align 16 .b8 tile[1024]` for one.
    pub variables: Vec<Variable>,
}

/// A variable of some state space.
#[derive(Clone)]
pub struct Variable {
    /// `shared`, `global`, `const`, `local` or `param`.
    pub space: String,
    /// Its name.
    pub name: String,
    /// Its size; 0 of an `.extern` array.
    pub bytes: usize,
    /// To which multiple its address is rounded up.
    pub align: usize,
    /// What it begins as.
    pub initial: Vec<u8>,
}

/// A kernel, its statements in order.
pub struct Kernel {
    /// In the order of the launch's arguments.
    pub parameters: Vec<Variable>,
    /// Of the body.
    pub statements: Vec<Statement>,
}

/// What stands between two semicolons.
#[derive(Debug)]
pub enum Statement {
    /// `{`: names declared from here to the matching end are its own.
    Begin,
    /// `}`
    End,
    /// `name:`
    Label(String),
    /// `.reg .b32 %r<12>`
    Directive(String),
    /// An instruction with its guard, `@%p1` or `@!%p1`.
    Instruction {
        /// The predicate's name, and whether it must hold.
        guard: Option<(String, bool)>,
        /// As written, `add.s32`.
        name: String,
        /// Between commas.
        operands: Vec<String>,
    },
}

impl Module {
    /// Finds kernels and variables.
    ///
    /// # Errors
    /// Says what is not understood.
    pub fn new(text: &str) -> Result<Self, String> {
        let text = without_comments(text);
        let (mut kernels, mut variables, mut target) = (HashMap::new(), Vec::new(), String::new());
        let mut at = 0;
        while at < text.len() {
            let rest = &text[at..];
            let begin = at + (rest.len() - rest.trim_start().len());
            let rest = &text[begin..];
            if rest.is_empty() {
                break;
            }
            let line = rest.find('\n').unwrap_or(rest.len());
            let head = &rest[..rest.find(['{', ';']).unwrap_or(rest.len())];
            if [".version", ".target", ".address_size"].iter().any(|one| head.starts_with(one)) {
                if let Some(named) = rest[..line].strip_prefix(".target") {
                    target = named.split(',').next().unwrap_or_default().trim().to_owned();
                }
                at = begin + line;
            } else if head.contains(".entry") || head.contains(".func") {
                // A prototype ends before it has a body.
                let body = matching(&rest[head.len()..]).ok_or("a body without end")?;
                let end = begin + head.len() + body;
                if let Some(name) = head.split(".entry").nth(1) {
                    let name = name.split('(').next().unwrap_or_default().trim();
                    kernels.insert(name.to_owned(), (begin, end));
                }
                at = end;
            } else {
                let end = rest.find(';').ok_or("a declaration without end")?;
                variables.extend(Variable::parse(&rest[..end])?);
                at = begin + end + 1;
            }
        }
        Ok(Self { text, kernels, target, variables })
    }

    /// A kernel's statements; none if there is no such kernel.
    pub fn kernel(&self, name: &str) -> Option<Result<Kernel, String>> {
        let (begin, end) = *self.kernels.get(name)?;
        Some(Kernel::parse(&self.text[begin..end]))
    }
}

impl Kernel {
    fn parse(text: &str) -> Result<Self, String> {
        let body = text.find('{').ok_or("no body")?;
        let open = text[..body].find('(').ok_or("no parameters")?;
        let close = text[..body].find(')').ok_or("no parameters")?;
        let parameters = text[open + 1..close].split(',').filter(|one| !one.trim().is_empty());
        let parameters = parameters.map(|one| Variable::parse(one)?.ok_or_else(|| format!("parameter {one}")));
        Ok(Self {
            parameters: parameters.collect::<Result<_, _>>()?,
            statements: statements(&text[body + 1..text.len() - 1]),
        })
    }
}

impl Variable {
    /// Of `.shared .align 4 .b8 name[12] = {1, 2}`; none if it is no declaration of a variable.
    pub fn parse(text: &str) -> Result<Option<Self>, String> {
        let (declared, initial) = text.split_once('=').unwrap_or((text, ""));
        let mut words = declared.split_whitespace();
        let (mut space, mut unit, mut align, mut name) = (None, 1, None, None);
        while let Some(word) = words.next() {
            match word {
                ".shared" | ".global" | ".const" | ".local" | ".param" => space = Some(word[1..].to_owned()),
                ".align" => align = words.next().and_then(|word| word.parse().ok()),
                ".visible" | ".extern" | ".weak" | ".ptr" => {}
                _ if word.starts_with('.') => {
                    let bits: usize = word[2..].parse().map_err(|_| format!("type {word} of {text:?}"))?;
                    unit = bits / 8;
                }
                _ => name = Some(word),
            }
        }
        let (Some(space), Some(name)) = (space, name) else { return Ok(None) };
        let (name, count) = match name.split_once('[') {
            Some((name, count)) => (name, count.trim_end_matches(']').parse().unwrap_or(0)),
            None => (name, 1),
        };
        let mut bytes = Vec::new();
        for number in initial.trim().trim_matches(['{', '}']).split(',').map(str::trim).filter(|one| !one.is_empty()) {
            let value = number_of(number).ok_or_else(|| format!("initial value {number} of {name}"))?;
            bytes.extend_from_slice(&value.to_le_bytes()[..unit]);
        }
        Ok(Some(Self {
            space,
            name: name.to_owned(),
            bytes: unit * count,
            align: align.unwrap_or(unit),
            initial: bytes,
        }))
    }
}

/// The bits of a literal: integers, `0f3F800000` and `0d3FF0000000000000`.
pub fn number_of(text: &str) -> Option<u64> {
    let (negative, digits) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
    let digits = digits.trim_end_matches('U');
    let value = match digits.get(..2) {
        Some("0f" | "0F" | "0d" | "0D" | "0x" | "0X") => u64::from_str_radix(&digits[2..], 16).ok()?,
        _ => digits.parse().ok()?,
    };
    Some(if negative { value.wrapping_neg() } else { value })
}

fn statements(body: &str) -> Vec<Statement> {
    let (mut all, mut at) = (Vec::new(), 0);
    loop {
        let rest = &body[at..];
        let begin = at + (rest.len() - rest.trim_start().len());
        let rest = &body[begin..];
        if rest.is_empty() {
            return all;
        }
        if let Some(first) = rest.chars().next().filter(|first| ['{', '}'].contains(first)) {
            all.push(if first == '{' { Statement::Begin } else { Statement::End });
            at = begin + 1;
            continue;
        }
        let end = rest.find(';').unwrap_or(rest.len());
        let word = rest.find(|letter: char| letter.is_whitespace() || letter == ':').unwrap_or(end);
        // A label ends with one colon; names of instructions have pairs of them (`.shared::cta`).
        if rest[word..].starts_with(':') && !rest[word..].starts_with("::") {
            all.push(Statement::Label(rest[..word].to_owned()));
            at = begin + word + 1;
            continue;
        }
        all.push(statement(&rest[..end]));
        at = begin + end + 1;
    }
}

fn statement(text: &str) -> Statement {
    if text.starts_with('.') {
        return Statement::Directive(text.to_owned());
    }
    let (guard, text) = match text.strip_prefix('@') {
        Some(rest) => {
            let (guard, rest) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
            let name = guard.trim_start_matches('!');
            (Some((name.to_owned(), !guard.starts_with('!'))), rest.trim_start())
        }
        None => (None, text),
    };
    let (name, operands) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    Statement::Instruction { guard, name: name.to_owned(), operands: split(operands) }
}

/// At commas that stand in no bracket.
pub fn split(text: &str) -> Vec<String> {
    let (mut parts, mut depth, mut part) = (Vec::new(), 0, String::new());
    for letter in text.chars() {
        match letter {
            '{' | '[' | '(' => depth += 1,
            '}' | ']' | ')' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(part.trim().to_owned());
                part.clear();
                continue;
            }
            _ => {}
        }
        part.push(letter);
    }
    if !part.trim().is_empty() {
        parts.push(part.trim().to_owned());
    }
    parts
}

/// How far it is to behind the bracket that closes the first one.
fn matching(text: &str) -> Option<usize> {
    let mut depth = 0;
    for (at, letter) in text.bytes().enumerate() {
        match letter {
            b'{' => depth += 1,
            b'}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(at + 1);
        }
    }
    None
}

fn without_comments(text: &str) -> String {
    let (mut out, mut rest) = (String::with_capacity(text.len()), text);
    while let Some(at) = rest.find("/*") {
        out.push_str(&rest[..at]);
        rest = rest[at..].split_once("*/").map_or("", |(_, after)| after);
    }
    out.push_str(rest);
    out.lines().flat_map(|line| [line.split("//").next().unwrap_or_default(), "\n"]).collect()
}
