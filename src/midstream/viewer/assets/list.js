// The list: filtered, sorted, and drawn only where it is looked at, so that ten thousand rows cost what fifty do.

const COLUMNS = [
  { name: 'id', label: 'prompt', text: (row) => `${row.id ?? '–'} · ${row.sample}`, order: (row) => row.number },
  { name: 'excerpt', label: 'question', text: (row) => row.excerpt, order: (row) => row.excerpt },
  { name: 'reward', label: 'reward', text: (row) => number(row.reward), order: (row) => row.reward ?? -Infinity, numeric: true },
  { name: 'tokens', label: 'tokens', text: (row) => number(row.tokens), order: (row) => row.tokens, numeric: true },
  { name: 'calls', label: 'calls', text: (row) => number(row.calls), order: (row) => row.calls, numeric: true },
  { name: 'errors', label: 'errors', text: (row) => number(row.errors), order: (row) => row.errors, numeric: true },
  { name: 'stop', label: 'stopped', text: (row) => row.stop, order: (row) => row.stop },
  { name: 'seconds', label: 'time', text: (row) => seconds(row.seconds), order: (row) => row.seconds, numeric: true },
];

class List {
  static HEIGHT = 30; // of a row, in pixels; the style has the same

  constructor(records, open) {
    this.records = records;
    this.open = open;
    this.shown = records.rows;
    this.sorted = { column: COLUMNS[0], downwards: false };
    this.selected = -1;
    this.search = 0;
    this.scroller = $('scroller');
    this.rows = $('rows');
    this.heads();
    for (const kind of [...new Set(records.rows.map((row) => row.stop))].sort()) $('stop').append(new Option(kind, kind));
    $('violations-label').hidden = !records.checked;
    for (const id of ['search', 'whole', 'stop', 'reward-from', 'reward-to', 'calls-from', 'with-errors', 'with-violations']) {
      $(id).addEventListener('input', () => this.filter());
    }
    this.scroller.addEventListener('scroll', () => this.draw(), { passive: true });
    new ResizeObserver(() => this.draw()).observe(this.scroller);
    this.rows.addEventListener('click', (event) => {
      const line = event.target.closest('.row');
      if (line) this.choose(Number(line.dataset.place));
    });
    this.filter();
  }

  heads() {
    for (const column of COLUMNS) {
      const head = make('button', `cell col-${column.name}`, column.label);
      head.type = 'button';
      head.addEventListener('click', () => {
        const downwards = this.sorted.column === column ? !this.sorted.downwards : Boolean(column.numeric);
        this.sorted = { column, downwards };
        this.filter();
      });
      column.head = head;
      $('columns').append(head);
    }
  }

  /** Which rows are shown, and in which order. A search of whole texts fills the list as it goes. */
  async filter() {
    const search = ++this.search;
    const words = $('search').value.toLowerCase().split(/\s+/).filter(Boolean);
    const whole = $('whole').checked && words.length > 0;
    const from = (id) => ($(id).value === '' ? null : Number($(id).value));
    const [rewardFrom, rewardTo, callsFrom] = [from('reward-from'), from('reward-to'), from('calls-from')];
    const fits = (row) => (whole || words.every((word) => row.key.includes(word)))
      && ($('stop').value === '' || row.stop === $('stop').value)
      && (rewardFrom === null || (row.reward !== null && row.reward >= rewardFrom))
      && (rewardTo === null || (row.reward !== null && row.reward <= rewardTo))
      && (callsFrom === null || row.calls >= callsFrom)
      && (!$('with-errors').checked || row.errors > 0)
      && (!$('with-violations').checked || row.violations > 0);
    if (!whole) { this.show(this.records.rows.filter(fits), null); return; }
    const found = [];
    this.show(found, 0);
    for await (const step of this.records.holding(words)) {
      if (search !== this.search) return; // something else was typed meanwhile
      found.push(...step.found.map((each) => this.records.rows[each]).filter(fits));
      this.show(found, step.share < 1 ? step.share : null);
    }
  }

  show(rows, share) {
    const current = this.shown[this.selected];
    const { column, downwards } = this.sorted;
    const sign = downwards ? -1 : 1;
    this.shown = [...rows].sort((a, b) => {
      const [left, right] = [column.order(a), column.order(b)];
      return left === right ? a.number - b.number : (left < right ? -sign : sign);
    });
    for (const each of COLUMNS) each.head.setAttribute('aria-sort', each !== column ? 'none' : downwards ? 'descending' : 'ascending');
    const [all, here] = [this.records.rows.length, rows.length];
    $('count').textContent = `${here === all ? '' : `${number(here)} of `}${number(all)} rollouts${share === null ? '' : ` · searching, ${Math.round(share * 100)} %`}`;
    this.selected = current ? this.shown.indexOf(current) : -1;
    this.rows.style.height = `${this.shown.length * List.HEIGHT}px`;
    this.draw();
  }

  draw() {
    const first = Math.max(0, Math.floor(this.scroller.scrollTop / List.HEIGHT) - 10);
    const last = Math.min(this.shown.length, Math.ceil((this.scroller.scrollTop + this.scroller.clientHeight) / List.HEIGHT) + 10);
    const lines = [];
    for (let place = first; place < last; place++) lines.push(this.line(place));
    this.rows.replaceChildren(...lines);
  }

  line(place) {
    const row = this.shown[place];
    const cells = COLUMNS.map((column) => make('span', `cell col-${column.name}`, column.text(row)));
    const line = make('div', 'row', ...cells);
    line.dataset.place = place;
    line.id = `row-${row.number}`;
    line.setAttribute('role', 'option');
    line.setAttribute('aria-selected', String(place === this.selected));
    line.style.top = `${place * List.HEIGHT}px`;
    if (row.violations) { line.classList.add('unsound'); line.title = `${row.violations} rules broken`; }
    return line;
  }

  choose(place) {
    if (place < 0 || place >= this.shown.length) return;
    this.open(this.shown[place].number);
  }

  move(steps) {
    this.choose(this.selected < 0 ? 0 : Math.min(this.shown.length - 1, Math.max(0, this.selected + steps)));
  }

  /** Mark the rollout that is open, and bring its line into view. */
  mark(opened) {
    this.selected = this.shown.findIndex((row) => row.number === opened);
    if (this.selected >= 0) {
      const top = this.selected * List.HEIGHT;
      if (top < this.scroller.scrollTop) this.scroller.scrollTop = top;
      const below = top + List.HEIGHT - this.scroller.clientHeight;
      if (below > this.scroller.scrollTop) this.scroller.scrollTop = below;
      this.scroller.setAttribute('aria-activedescendant', `row-${opened}`);
    }
    this.draw();
  }
}
