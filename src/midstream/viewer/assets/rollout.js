// One rollout: its facts, its time, its tokens, its blocks.

const PICTURES = new Set(['image/png', 'image/jpeg', 'image/gif', 'image/webp']);
const TOKENS_TOGETHER = 500; // drawn as one piece (up to the next end of a line), and not at all while far from view

class Rollout {
  constructor(records, siblings) {
    this.records = records;
    this.siblings = siblings;
    this.place = $('rollout');
    this.heat = false;
    this.place.addEventListener('mouseover', (event) => this.hover(event.target.closest('.token')));
    this.place.addEventListener('mouseleave', () => this.hover(null));
    this.place.addEventListener('scroll', () => this.hover(null), { passive: true });
    this.place.addEventListener('keydown', (event) => this.step(event));
  }

  async show(opened) {
    const detail = await this.records.detail(opened);
    this.row = this.records.rows[opened];
    this.detail = detail;
    this.origins = spread(detail.origins);
    this.versions = spread(detail.versions);
    this.firstLogprob = [];
    let generated = 0;
    for (const origin of this.origins) this.firstLogprob.push(origin === 'generated' ? generated++ : -1);
    this.block = -1;
    this.hover(null);
    this.place.replaceChildren(this.head(), this.facts(), this.certificate(), this.timeline(), this.text(), ...this.blocks());
    this.place.scrollTop = 0;
  }

  head() {
    const { detail, row } = this;
    const head = make('div', 'head', make('h2', '', `${detail.id ?? 'rollout'} · ${row.number + 1}`), make('span', 'dim', `sample ${detail.sample}`));
    if (detail.reward !== null) head.append(make('span', 'reward', `reward ${number(detail.reward)}`));
    head.append(make('span', 'dim', `${number(row.prompt)} prompt + ${number(row.generated)} generated + ${number(row.injected)} injected tokens, ${seconds(detail.duration)}`));
    head.append(make('span', 'space'), this.button('Siblings', 's', () => this.siblings(detail.group)), this.button('Shade', 'h', () => this.shade()));
    return head;
  }

  button(label, key, act) {
    const button = make('button', '', label);
    button.type = 'button';
    button.title = `${label} (${key})`;
    button.addEventListener('click', act);
    return button;
  }

  facts() {
    const list = make('dl', 'facts');
    for (const [name, value] of Object.entries(this.detail.facts)) {
      list.append(make('dt', '', name), make('dd', '', typeof value === 'object' ? JSON.stringify(value) : String(value)));
    }
    const folded = make('details', '', make('summary', '', `stopped: ${this.detail.facts.stopped}`), list);
    return folded;
  }

  certificate() {
    if (!this.records.checked) return make('p', 'dim', 'Not checked.');
    const { violations } = this.detail;
    if (violations.length === 0) return make('p', 'sound', 'Sound: the record keeps every rule that can be checked from it.');
    return make('div', 'violations', make('strong', '', `${violations.length} rules broken`), make('ul', '', ...violations.map((text) => make('li', '', text))));
  }

  /** Decoding has the time that no block took, shared out by its tokens: a record has no finer clock. */
  timeline() {
    const { detail } = this;
    const running = detail.calls.reduce((sum, entry) => sum + (entry.result?.duration ?? 0), 0);
    const whole = Math.max(detail.duration, running) || 1;
    const perToken = Math.max(0, whole - running) / Math.max(1, this.row.generated);
    const bar = make('div', 'timeline');
    bar.setAttribute('role', 'img');
    bar.setAttribute('aria-label', `decoding ${seconds(whole - running)}, code ${seconds(running)}`);
    const part = (kind, time, title) => {
      const piece = make('div', kind);
      piece.style.flexGrow = String(time / whole);
      piece.title = title;
      bar.append(piece);
      return piece;
    };
    let before = this.row.prompt;
    for (const entry of [...detail.calls, null]) {
      const until = entry ? entry.call.position : this.origins.length;
      let tokens = 0;
      for (let i = before; i < until; i++) if (this.origins[i] === 'generated') tokens++;
      if (tokens) part('decoding', tokens * perToken, `${tokens} tokens, about ${seconds(tokens * perToken)}`);
      before = until;
      if (!entry?.result) continue;
      const { result } = entry;
      const piece = part(result.error ? 'running failed' : 'running', result.duration, `block ${entry.call.index + 1}: ${seconds(result.duration)}`);
      for (const call of result.tool_calls) {
        const tick = make('div', call.error ? 'tool failed' : 'tool');
        tick.style.left = `${(100 * call.started) / (result.duration || 1)}%`;
        tick.style.width = `${(100 * call.duration) / (result.duration || 1)}%`;
        tick.title = `${call.name}: ${seconds(call.duration)}`;
        piece.append(tick);
      }
    }
    return make('div', '', bar, make('p', 'legend', make('span', 'decoding', 'decoding'), make('span', 'running', 'code'), make('span', 'tool', 'tools')));
  }

  text() {
    const tokens = make('div', this.heat ? 'tokens heat' : 'tokens');
    tokens.tabIndex = 0;
    tokens.setAttribute('aria-label', 'Tokens');
    this.elements = this.origins.map((_, index) => this.token(index));
    for (let from = 0, until = 0; from < this.elements.length; from = until) {
      until = Math.min(from + TOKENS_TOGETHER, this.elements.length);
      while (until < this.elements.length && !this.detail.texts[until - 1].endsWith('\n')) until++;
      tokens.append(make('div', 'piece', ...this.elements.slice(from, until)));
    }
    this.tokens = tokens;
    const legend = make('p', 'legend', make('span', 'prompt', 'prompt'), make('span', 'generated', 'generated'), make('span', 'injected', 'injected'));
    return make('div', '', legend, tokens);
  }

  token(index) {
    const text = this.detail.texts[index];
    const token = make('span', `token ${this.origins[index]}`, text);
    if (text === '') token.classList.add('partial');
    else if (/^\s*\n\s*$/.test(text)) token.classList.add('newline');
    token.dataset.index = index;
    const place = this.firstLogprob[index];
    if (place >= 0) token.style.setProperty('--surprise', Math.min(1, -this.detail.logprobs[place] / 5).toFixed(3));
    return token;
  }

  blocks() {
    return this.detail.calls.map((entry) => {
      const { call, result } = entry;
      const facts = [`block ${call.index + 1}`, `ends at token ${call.position}`];
      if (result) facts.push(seconds(result.duration));
      if (call.declined) facts.push(`not run: ${call.declined}`);
      for (const [flag, words] of [['timed_out', 'out of time'], ['state_lost', 'state lost'],
        ['rolled_back', 'undone'], ['truncated', 'output cut']]) if (result?.[flag]) facts.push(words);
      if (result?.breached) facts.push(`limit: ${result.breached}`);
      if (entry.cut_characters) facts.push(`${number(entry.cut_characters)} characters left out`);
      const block = make('section', 'block', make('h3', '', facts.join(' · ')), highlighted(call.code));
      if (!result) block.append(make('p', 'dim', 'no result: the rollout ended first'));
      else block.append(...this.result(result));
      return block;
    });
  }

  result(result) {
    const parts = [];
    if (result.text) parts.push(make('pre', result.error ? 'result failed' : 'result', result.text));
    if (result.error?.traceback) parts.push(make('details', '', make('summary', '', 'traceback'), make('pre', 'result failed', result.error.traceback)));
    if (result.tool_calls.length) {
      const lines = result.tool_calls.map((call) => {
        const inside = [...call.arguments.map((each) => JSON.stringify(each)), ...Object.entries(call.keyword_arguments).map(([name, each]) => `${name}=${JSON.stringify(each)}`)];
        const answer = call.error ? `${call.error.type}: ${call.error.message}` : JSON.stringify(call.value);
        return make('li', call.error ? 'failed' : '', make('code', '', `${call.name}(${inside.join(', ')})`), ` → ${answer} `, make('span', 'dim', seconds(call.duration)));
      });
      parts.push(make('ul', 'tools', ...lines));
    }
    for (const media of result.media) {
      if (!PICTURES.has(media.mime)) { parts.push(make('p', 'dim', `(${media.mime}, not shown)`)); continue; }
      const picture = make('img', 'picture');
      picture.src = `data:${media.mime};base64,${media.data}`;
      picture.alt = 'a picture that the code made';
      parts.push(picture);
    }
    return parts;
  }

  hover(token) {
    const tip = $('tip');
    this.cursor?.classList.remove('cursor');
    this.cursor = token;
    tip.hidden = !token;
    if (!token) return;
    token.classList.add('cursor');
    const index = Number(token.dataset.index);
    const lines = [[JSON.stringify(this.detail.texts[index]), ''], ['id', this.detail.ids[index]], ['position', index], ['origin', this.origins[index]]];
    const place = this.firstLogprob[index];
    if (place >= 0) {
      const logprob = this.detail.logprobs[place];
      lines.push(['logprob', logprob], ['probability', `${(100 * Math.exp(logprob)).toPrecision(3)} %`], ['weights', `version ${this.versions[place]}`]);
    }
    tip.replaceChildren(...lines.map(([name, value]) => make('div', '', make('b', '', String(name)), ` ${value}`)));
    const box = token.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(box.left, window.innerWidth - tip.offsetWidth - 8))}px`;
    const below = box.bottom + 6;
    tip.style.top = `${below + tip.offsetHeight > window.innerHeight ? box.top - tip.offsetHeight - 6 : below}px`;
  }

  /** The arrows move from token to token where the text has the keyboard. */
  step(event) {
    if (event.target !== this.tokens || (event.key !== 'ArrowLeft' && event.key !== 'ArrowRight')) return;
    event.preventDefault();
    const current = this.cursor ? Number(this.cursor.dataset.index) : -1;
    const next = Math.min(this.origins.length - 1, Math.max(0, current + (event.key === 'ArrowRight' ? 1 : -1)));
    this.elements[next].scrollIntoView({ block: 'nearest' });
    this.hover(this.elements[next]);
  }

  shade() {
    this.heat = !this.heat;
    this.tokens?.classList.toggle('heat', this.heat);
  }

  moveBlock(steps) {
    const blocks = this.place.querySelectorAll('.block');
    if (blocks.length === 0) return;
    this.block = Math.min(blocks.length - 1, Math.max(0, this.block + steps));
    blocks[this.block].scrollIntoView({ block: 'start' });
  }
}
