//! Splits PTX text into kernels, variables and statements. `decode` gives the instructions their meaning.

use std::collections::HashMap;

/// A PTX module. Kernels stay text until they are looked up.
pub struct Module {
    text: String,
    /// Range of each kernel's signature and body in `text`.
    kernels: HashMap<String, (usize, usize)>,
    /// The architecture it was compiled for, such as `sm_80`.
    pub target: String,
    /// Module-scope declarations, such as `.shared .align 16 .b8 tile[1024]`.
    pub variables: Vec<Variable>,
}

/// A variable declaration.
#[derive(Clone)]
pub struct Variable {
    /// `shared`, `global`, `const`, `local` or `param`.
    pub space: String,
    /// Its name.
    pub name: String,
    /// Its size; 0 for an `.extern` array.
    pub bytes: usize,
    /// Its alignment.
    pub align: usize,
    /// Its initial value; shorter than `bytes` if the rest is zero.
    pub initial: Vec<u8>,
}

/// A kernel as text statements.
pub struct Kernel {
    /// In the order of the launch arguments.
    pub parameters: Vec<Variable>,
    /// The body.
    pub statements: Vec<Statement>,
}

/// A statement of a kernel body.
#[derive(Debug)]
pub enum Statement {
    /// `{`, which opens a scope for names.
    OpenScope,
    /// `}`
    CloseScope,
    /// A label, without its colon.
    Label(String),
    /// A directive, such as `.reg .b32 %r<12>`.
    Directive(String),
    /// An instruction.
    Instruction {
        /// The predicate of `@%p1` or `@!%p1`, and the value it must have.
        guard: Option<(String, bool)>,
        /// With modifiers, such as `add.s32`.
        name: String,
        /// Operands, split at commas.
        operands: Vec<String>,
    },
}

impl Module {
    /// Finds kernels and variables.
    ///
    /// # Errors
    /// Says which text could not be parsed.
    pub fn new(text: &str) -> Result<Self, String> {
        let text = without_comments(text);
        let mut kernels = HashMap::new();
        let mut variables = Vec::new();
        let mut target = String::new();
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
            if [".version", ".target", ".address_size"].iter().any(|directive| head.starts_with(directive)) {
                if let Some(named) = rest[..line].strip_prefix(".target") {
                    target = named.split(',').next().unwrap_or_default().trim().to_owned();
                }
                at = begin + line;
            } else if head.contains(".entry") || head.contains(".func") {
                // A prototype ends at its semicolon and has no body.
                let body = length_of_braces(&rest[head.len()..]).ok_or("a body without an end")?;
                let end = begin + head.len() + body;
                if let Some(name) = head.split(".entry").nth(1) {
                    let name = name.split('(').next().unwrap_or_default().trim();
                    kernels.insert(name.to_owned(), (begin, end));
                }
                at = end;
            } else {
                let end = rest.find(';').ok_or("a declaration without an end")?;
                variables.extend(Variable::parse(&rest[..end])?);
                at = begin + end + 1;
            }
        }
        Ok(Self { text, kernels, target, variables })
    }

    /// Parses a kernel; none if the module has no such entry point.
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
        let parameters = text[open + 1..close].split(',').filter(|text| !text.trim().is_empty());
        let parameters = parameters.map(|text| Variable::parse(text)?.ok_or_else(|| format!("parameter {text}")));
        Ok(Self {
            parameters: parameters.collect::<Result<_, _>>()?,
            statements: statements(&text[body + 1..text.len() - 1]),
        })
    }
}

impl Variable {
    /// Parses `.shared .align 4 .b8 name[12] = {1, 2}`; none if the text declares no variable.
    pub fn parse(text: &str) -> Result<Option<Self>, String> {
        let (declared, initial) = text.split_once('=').unwrap_or((text, ""));
        let mut words = declared.split_whitespace();
        let mut space = None;
        let mut element_bytes = 1;
        let mut align = None;
        let mut name = None;
        while let Some(word) = words.next() {
            match word {
                ".shared" | ".global" | ".const" | ".local" | ".param" => space = Some(word[1..].to_owned()),
                ".align" => align = words.next().and_then(|word| word.parse().ok()),
                ".visible" | ".extern" | ".weak" | ".ptr" => {}
                _ if word.starts_with('.') => {
                    let bits: usize = word[2..].parse().map_err(|_| format!("type {word} of {text:?}"))?;
                    element_bytes = bits / 8;
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
        for number in initial.trim().trim_matches(['{', '}']).split(',').map(str::trim).filter(|text| !text.is_empty())
        {
            let value = literal(number).ok_or_else(|| format!("initial value {number} of {name}"))?;
            bytes.extend_from_slice(&value.to_le_bytes()[..element_bytes]);
        }
        Ok(Some(Self {
            space,
            name: name.to_owned(),
            bytes: element_bytes * count,
            align: align.unwrap_or(element_bytes),
            initial: bytes,
        }))
    }
}

/// Parses a literal to its bits: integers, `0f3F800000` and `0d3FF0000000000000`.
pub fn literal(text: &str) -> Option<u64> {
    let (negative, digits) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
    let digits = digits.trim_end_matches('U');
    let value = match digits.get(..2) {
        Some("0f" | "0F" | "0d" | "0D" | "0x" | "0X") => u64::from_str_radix(&digits[2..], 16).ok()?,
        _ => digits.parse().ok()?,
    };
    Some(if negative { value.wrapping_neg() } else { value })
}

fn statements(body: &str) -> Vec<Statement> {
    let mut all = Vec::new();
    let mut at = 0;
    loop {
        let rest = &body[at..];
        let begin = at + (rest.len() - rest.trim_start().len());
        let rest = &body[begin..];
        if rest.is_empty() {
            return all;
        }
        if let Some(first) = rest.chars().next().filter(|first| ['{', '}'].contains(first)) {
            all.push(if first == '{' { Statement::OpenScope } else { Statement::CloseScope });
            at = begin + 1;
            continue;
        }
        let end = rest.find(';').unwrap_or(rest.len());
        let word = rest.find(|letter: char| letter.is_whitespace() || letter == ':').unwrap_or(end);
        // A label ends in one colon; instruction names contain pairs of them (`.shared::cta`).
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
    Statement::Instruction { guard, name: name.to_owned(), operands: split_operands(operands) }
}

/// Splits at commas outside of brackets.
pub fn split_operands(text: &str) -> Vec<String> {
    let mut parts = Vec::new();
    let mut depth = 0;
    let mut part = String::new();
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

/// Length of the text up to and including the brace that closes the first one.
fn length_of_braces(text: &str) -> Option<usize> {
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
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("/*") {
        out.push_str(&rest[..at]);
        rest = rest[at..].split_once("*/").map_or("", |(_, after)| after);
    }
    out.push_str(rest);
    out.lines().flat_map(|line| [line.split("//").next().unwrap_or_default(), "\n"]).collect()
}
