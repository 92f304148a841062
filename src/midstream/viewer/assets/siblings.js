// The samples of one prompt, side by side.

class Siblings {
  static TOGETHER = 12;

  constructor(records, open) {
    this.records = records;
    this.open = open;
  }

  async show(group) {
    const rows = this.records.siblings(group);
    const columns = make('div', 'siblings');
    const more = async (from) => {
      columns.querySelector('.more')?.remove();
      for (const row of rows.slice(from, from + Siblings.TOGETHER)) columns.append(this.column(row, await this.records.detail(row.number)));
      const rest = rows.length - from - Siblings.TOGETHER;
      if (rest <= 0) return;
      const button = make('button', 'more', `${number(rest)} more`);
      button.type = 'button';
      button.addEventListener('click', () => more(from + Siblings.TOGETHER));
      columns.append(button);
    };
    await more(0);
    const rewards = rows.map((row) => row.reward).filter((reward) => reward !== null);
    const mean = rewards.length ? `, mean reward ${number(rewards.reduce((a, b) => a + b, 0) / rewards.length)}` : '';
    $('rollout').replaceChildren(make('div', 'head', make('h2', '', 'Siblings'), make('span', 'dim', `${number(rows.length)} samples of one prompt${mean}`)), columns);
    $('rollout').scrollTop = 0;
  }

  column(row, detail) {
    const title = make('button', 'link', `sample ${detail.sample}`);
    title.type = 'button';
    title.addEventListener('click', () => this.open(row.number));
    const column = make('article', '', make('header', '', title, make('span', 'reward', `reward ${number(row.reward)}`), make('span', 'dim', `${row.stop}, ${number(row.generated)} tokens, ${number(row.calls)} calls`)));
    const text = make('div', 'tokens');
    let from = 0;
    for (const [origin, length] of detail.origins) {
      if (origin !== 'prompt') text.append(make('span', origin, detail.texts.slice(from, from + length).join('')));
      from += length;
    }
    column.append(text);
    return column;
  }
}
