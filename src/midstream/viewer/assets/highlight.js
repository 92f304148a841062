// Python, coloured well enough to read: one pass, no backtracking over what a model wrote.

const PYTHON = /("""|''')|([rbfuRBFU]{0,2})(["'])|(#[^\n]*)|(\d[\w.]*)|(@?[A-Za-z_]\w*)/g;
const KEYWORDS = new Set(('False None True and as assert async await break class continue def del elif else except finally for from ' +
  'global if import in is lambda nonlocal not or pass raise return try while with yield match case').split(' '));

function highlighted(code) {
  const pre = make('pre', 'code');
  let plain = 0;
  const put = (className, from, to) => {
    if (from > plain) pre.append(code.slice(plain, from));
    pre.append(make('span', className, code.slice(from, to)));
    plain = to;
  };
  PYTHON.lastIndex = 0;
  for (let match; (match = PYTHON.exec(code));) {
    const from = match.index;
    if (match[1]) {
      const end = code.indexOf(match[1], PYTHON.lastIndex);
      put('string', from, end < 0 ? code.length : end + 3);
    } else if (match[3]) {
      put('string', from, stringEnd(code, PYTHON.lastIndex, match[3]));
    } else if (match[4]) {
      put('comment', from, PYTHON.lastIndex);
    } else if (match[5]) {
      put('number', from, PYTHON.lastIndex);
    } else if (match[6] && KEYWORDS.has(match[6])) {
      put('keyword', from, PYTHON.lastIndex);
    } else if (match[6] && code[PYTHON.lastIndex] === '(') {
      put('call', from, PYTHON.lastIndex);
    } else {
      continue;
    }
    PYTHON.lastIndex = plain;
  }
  pre.append(code.slice(plain));
  return pre;
}

function stringEnd(code, position, quote) {
  for (; position < code.length && code[position] !== '\n'; position++) {
    if (code[position] === '\\') position++;
    else if (code[position] === quote) return position + 1;
  }
  return Math.min(position, code.length);
}
