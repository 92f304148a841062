// The records: a line of each, read at once, and the rest by the chunk, when it is asked for.

const $ = (id) => document.getElementById(id);

/** An element with a class and children. Text goes in as text, so nothing in a rollout becomes markup. */
function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

async function unpack(id) {
  const packed = atob($(id).textContent);
  const bytes = new Uint8Array(packed.length);
  for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'));
  return JSON.parse(await new Response(stream).text());
}

class Records {
  static KEPT = 16; // chunks that stay unpacked

  static async open() {
    const index = await unpack('index');
    return new Records(index);
  }

  constructor(index) {
    this.title = index.title;
    this.checked = index.checked;
    this.rows = index.rows.map((values, number) => {
      const row = { number };
      index.columns.forEach((name, column) => { row[name] = values[column]; });
      row.tokens = row.prompt + row.generated + row.injected;
      row.key = `${row.id ?? ''} ${row.group} ${row.excerpt}`.toLowerCase();
      return row;
    });
    this.starts = [];
    let start = 0;
    for (const size of index.chunks) { this.starts.push(start); start += size; }
    this.unpacked = new Map();
  }

  /** The whole of rollout `number`. */
  async detail(number) {
    const chunk = this.chunkOf(number);
    return (await this.chunk(chunk))[number - this.starts[chunk]];
  }

  chunkOf(number) {
    let low = 0, high = this.starts.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.starts[middle] <= number) low = middle; else high = middle - 1;
    }
    return low;
  }

  chunk(chunk) {
    const found = this.unpacked.get(chunk) ?? unpack(`chunk-${chunk}`);
    this.unpacked.delete(chunk); // again at the end: the one that was used last is dropped last
    this.unpacked.set(chunk, found);
    if (this.unpacked.size > Records.KEPT) this.unpacked.delete(this.unpacked.keys().next().value);
    return found;
  }

  siblings(group) { return this.rows.filter((row) => row.group === group); }

  /** The numbers of the rollouts whose whole text holds `words`, a chunk at a time. */
  async *holding(words) {
    for (let chunk = 0; chunk < this.starts.length; chunk++) {
      const details = await this.chunk(chunk);
      const found = [];
      details.forEach((detail, offset) => {
        const text = detail.texts.join('').toLowerCase();
        if (words.every((word) => text.includes(word))) found.push(this.starts[chunk] + offset);
      });
      yield { found, share: (chunk + 1) / this.starts.length };
    }
  }
}

/** Runs `[what, length]` as an array with one `what` for each place. */
function spread(runs) {
  const all = [];
  for (const [what, length] of runs) for (let i = 0; i < length; i++) all.push(what);
  return all;
}

function seconds(value) {
  if (value >= 100) return `${value.toFixed(0)} s`;
  if (value >= 1) return `${value.toFixed(2)} s`;
  return value >= 0.001 ? `${(value * 1000).toFixed(value >= 0.1 ? 0 : 1)} ms` : `${(value * 1e6).toFixed(0)} µs`;
}

function number(value) { return value === null || value === undefined ? '–' : value.toLocaleString('en', { maximumFractionDigits: 4 }); }
