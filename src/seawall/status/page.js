'use strict';
const SPAN = 120, SMOOTHED = 5, SILENCE = 5000, AGAIN = 5000;
const main = document.querySelector('main'), state = document.querySelector('#state');
let seen = [], silence;

function say(text) {
  if (state.textContent !== text) state.textContent = text;
}

// What the server has rendered replaces what differs from it, and nothing else: a selection and a focus stay, and a
// screen reader speaks of what is new. What has `data-own` is drawn here.
function morph(old, fresh) {
  if (old.nodeName !== fresh.nodeName) return old.replaceWith(fresh);
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return;
  }
  if (old.hasAttribute('data-own')) return;
  for (const { name } of [...old.attributes]) if (!fresh.hasAttribute(name)) old.removeAttribute(name);
  for (const { name, value } of fresh.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  const before = [...old.childNodes], after = [...fresh.childNodes];
  after.forEach((node, at) => before[at] ? morph(before[at], node) : old.append(node));
  before.slice(after.length).forEach(node => node.remove());
}

function take(now) {
  now.at = Date.parse(now.time) / 1000;
  const last = seen.at(-1);
  // Another process answers, or the same one that has begun anew.
  if (last && (last.pid !== now.pid || Object.keys(now.requests).some(name => now.requests[name] < last.requests[name]))) seen = [];
  seen.push(now);
  seen = seen.filter(one => now.at - one.at <= SPAN);
  showRates(now);
  showChart(now);
}

function showRates(now) {
  const since = seen.find(one => now.at - one.at <= SMOOTHED), seconds = now.at - since.at;
  for (const cell of document.querySelectorAll('[data-rate]')) {
    const name = cell.dataset.rate;
    cell.textContent = seconds > 0 ? ((now.requests[name] - since.requests[name]) / seconds).toFixed(1) : '';
  }
}

function showChart(now) {
  const limits = seen.map(one => one.overload.limit), flights = seen.map(one => one.overload.in_flight);
  const most = Math.max(1, ...limits.filter(Number.isFinite), ...flights.filter(Number.isFinite)) * 1.1;
  for (const [name, values] of [['limit', limits], ['flight', flights]]) {
    const points = values.map((value, at) => `${(SPAN + seen[at].at - now.at).toFixed(1)},${(40 - 40 * value / most).toFixed(1)}`);
    document.querySelector(`polyline.${name}`)?.setAttribute('points', points.join(' '));
  }
}

function connect() {
  const source = new EventSource('?page');
  source.addEventListener('page', event => {
    const fresh = new DOMParser().parseFromString(event.data, 'text/html').querySelector('main');
    morph(main, fresh);
    document.title = main.dataset.title;
  });
  source.onmessage = event => {
    clearTimeout(silence);
    silence = setTimeout(say, SILENCE, 'Not connected; what is shown is old.');
    say('Live.');
    take(JSON.parse(event.data));
  };
  source.onerror = () => {
    // It connects again by itself, unless it was refused.
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, AGAIN);
  };
}

document.documentElement.classList.add('scripted');
silence = setTimeout(say, SILENCE, 'Not connected; what is shown is old.');
connect();
