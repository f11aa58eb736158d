// ---- the verdict, the facts, and both as Markdown for a bug report ----
function drawHead() {
  $('command').textContent = `minitp ${data.command}`;
  $('title').textContent = document.title = data.title;
  $('verdict').classList.toggle('failed', !data.ok);
  $('verdict').append(h('b', {}, icon(data.ok), data.ok ? 'Passed' : 'Failed'), h('span', {}, h('bdi', {}, data.verdict)));
  $('diagnosis').hidden = !guilty?.note;
  $('diagnosis').append(h('bdi', {}, guilty?.note ?? ''));
  $('problems').hidden = !data.problems?.length;
  $('problems').append(...(data.problems ?? []).map(line => h('li', {}, h('bdi', {}, line))));
  $('facts').append(...(data.facts ?? []).map(([key, value]) => h('div', { class: key }, h('dt', {}, h('bdi', {}, key)), h('dd', {},
    value.length <= 160 ? h('bdi', {}, value)
      : h('details', {}, h('summary', {}, h('bdi', {}, value.slice(0, 120), '…')), h('bdi', {}, value))))));
  $('errors-title').textContent = data.layers ? 'Every step' : 'Every tensor';
  if (cells.length) $('summary').append(`${plural(cells.length, 'comparison')}, ${count(wrong.length)} out of bounds.`);
  const where = cells.length && !wrong.length && closest.bounded?.share > 0;
  if (where) $('summary').append(` Closest to its bound, at ${brief(closest.bounded.share)} of it: `,
    h('span', { class: 'name' }, h('bdi', {}, fullName(closest))), closest.rank === null ? '.' : ` on rank ${closest.rank}.`);
  $('copy').addEventListener('click', copyMarkdown);
}

const MOST_WRONG = 20;  // wrong steps in the Markdown table
function markdownText(text) {  // one line in which no character of the data acts as markup
  return String(text).replace(/\s+/g, ' ').replace(/[\\`*_{}[\]<>|#~]/g, '\\$&');
}
function markdownTable(titles, lines) {
  const row = columns => `| ${columns.map(markdownText).join(' | ')} |`;
  return [row(titles), `|${titles.map(() => '---|').join('')}`, ...lines.map(row)].join('\n');
}
function markdown() {
  const said = `**${data.ok ? 'Passed' : 'Failed'}**: ${markdownText(data.verdict)}`;
  const parts = [`### minitp ${data.command}: ${markdownText(data.title)}`, said, markdownTable(['fact', 'value'], data.facts ?? [])];
  if (data.problems?.length) parts.push(data.problems.map(line => `- ${markdownText(line)}`).join('\n'));
  const lines = wrong.slice(0, MOST_WRONG).map(cell => [fullName(cell), rankName(cell.rank) || '–', brief(cell.bounded?.relative),
    brief(cell.bounded?.bound), indexText(cell.bounded?.index), cell.note]);
  if (lines.length) parts.push(markdownTable(['wrong step', 'rank', 'relative error', 'bound', 'worst at', 'note'], lines));
  if (wrong.length > MOST_WRONG) parts.push(`and ${wrong.length - MOST_WRONG} more wrong steps`);
  return parts.join('\n\n') + '\n';
}
async function copyMarkdown() {
  const text = markdown();
  let copied = await (navigator.clipboard?.writeText(text).then(() => true, () => false) ?? false);
  if (!copied) {  // some browsers give a page that was opened from a file no clipboard
    const box = h('textarea', { class: 'away' }, text);
    document.body.append(box);
    box.select();
    copied = document.execCommand('copy');
    box.remove();
  }
  $('copy').textContent = copied ? 'Copied' : 'Could not copy';
  setTimeout(() => { $('copy').textContent = 'Copy as Markdown'; }, 2000);
}
